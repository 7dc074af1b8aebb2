// What the pages do beyond HTML: keys, copying, live decisions, charts, closing
// tunnels. No page needs it for reading. Text from the network is set with
// textContent and nothing else.
"use strict";
(() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  document.documentElement.classList.add("js");

  // visible writes out what has no shape of its own, as visible.go does.
  const maxShown = 512;
  const visible = (s) => {
    const out = String(s ?? "").replace(/[\p{C}\p{Z}\p{Mn}]/gu, (c) => {
      if (c === " ") return c;
      const n = c.codePointAt(0);
      return n > 0xffff ? `\\u{${n.toString(16)}}` : `\\u${n.toString(16).padStart(4, "0")}`;
    });
    return out.length > maxShown ? out.slice(0, maxShown) + "…" : out;
  };
  const short = (f) => f === 0 ? "0" : f < 10 ? String(+f.toFixed(2)) : f < 100 ? String(+f.toFixed(1)) : Math.round(f).toLocaleString("en-GB");
  const size = (f) => {
    let i = 0;
    for (; f >= 999.5 && i < 6; i++) f /= 1024;
    return i ? `${short(f)} ${["", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"][i]}` : `${Math.round(f)} B`;
  };

  // The connection: lost as soon as one request fails, mended with the next that works.
  let reachable = true;
  const reached = (ok) => {
    if (ok === reachable) return;
    reachable = ok;
    $("#lost").hidden = ok;
    document.dispatchEvent(new CustomEvent(ok ? "mended" : "lost"));
  };
  // The page's own address may have a password in it, which requests must not.
  const here = (url) => location.origin + url;
  const ask = async (url, options) => {
    try {
      const answer = await fetch(here(url), { cache: "no-store", ...options });
      reached(true);
      return answer;
    } catch (e) {
      reached(false);
      throw e;
    }
  };

  // Regions marked data-refresh are replaced by what the server says now, unless
  // somebody is in them.
  const refreshEvery = 5000;
  const refresh = async () => {
    const regions = $$("[data-refresh][id]");
    if (document.hidden || !regions.length) return;
    // A page without such regions of its own asks a cheaper one for the header's.
    const answer = await ask($("main [data-refresh]") ? location.pathname + location.search : "/health");
    if (!answer.ok) {
      if (answer.status === 401) location.reload(); // signed out
      return;
    }
    const next = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const region of regions) {
      const fresh = next.getElementById(region.id);
      if (!fresh || region.innerHTML === fresh.innerHTML) continue;
      const busy = region.contains(document.activeElement) && document.activeElement !== region;
      if (busy || !getSelection().isCollapsed && region.contains(getSelection().anchorNode)) continue;
      const open = new Set($$("details[open][data-key]", region).map((d) => d.dataset.key));
      for (const d of $$("details[data-key]", fresh)) d.open = open.has(d.dataset.key);
      region.replaceChildren(...fresh.childNodes);
    }
    narrow();
  };
  const repeat = (work, every) => {
    const step = () => work().catch(() => {}).finally(() => setTimeout(step, every));
    setTimeout(step, every);
    document.addEventListener("visibilitychange", () => { if (!document.hidden) work().catch(() => {}); });
  };

  // A field with data-filter hides the rows that lack one of its words, as one types.
  const narrow = () => {
    for (const field of $$("input[data-filter]")) {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of $$(field.dataset.filter)) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((w) => text.includes(w));
      }
    }
  };
  document.addEventListener("input", (e) => { if (e.target.matches("input[data-filter]")) narrow(); });

  // Copying.
  document.addEventListener("click", async (e) => {
    const button = e.target.closest("button[data-copy]");
    if (!button) return;
    const pre = button.parentElement.querySelector("pre");
    let ok = true;
    try {
      await navigator.clipboard.writeText(pre.textContent);
    } catch { // not a secure context: http on another address than loopback
      getSelection().selectAllChildren(pre);
      ok = document.execCommand("copy");
    }
    button.textContent = ok ? "Copied" : "Press Ctrl+C";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });

  // Keys.
  let went = 0; // when g was pressed
  document.addEventListener("keydown", (e) => {
    const typing = e.target.matches("input, select, textarea") || e.target.closest("dialog");
    if (e.key === "Escape" && e.target.matches("input, select")) {
      e.target.blur();
      return;
    }
    if (typing || e.ctrlKey || e.altKey || e.metaKey) return;
    if (went && e.timeStamp - went < 1500) {
      went = 0;
      const link = $$("nav a[data-key]").find((a) => a.dataset.key === e.key);
      if (link) link.click();
      return;
    }
    switch (e.key) {
      case "/": {
        const field = $("[data-focus]");
        if (!field) return;
        field.focus();
        field.select();
        break;
      }
      case "g":
        went = e.timeStamp;
        return;
      case "s":
        $("#pause")?.click();
        return;
      case "?":
        $("#keys").showModal();
        break;
      default:
        return;
    }
    e.preventDefault();
  });

  // Tunnels: one is closed by the API, after a question.
  const closing = $("#closing");
  if (closing) {
    let chosen = null;
    document.addEventListener("click", (e) => {
      const button = e.target.closest("button[data-close]");
      if (!button) return;
      chosen = button.dataset.close;
      $("#closing-what").textContent = button.dataset.what;
      closing.returnValue = "";
      closing.showModal();
    });
    closing.addEventListener("close", async () => {
      if (closing.returnValue !== "close" || !chosen) return;
      const said = $("#said");
      try {
        const answer = await ask(`/api/v1/tunnels/${encodeURIComponent(chosen)}`, { method: "DELETE", headers: { "X-Sallyport-Client": "dashboard" } });
        said.textContent = answer.ok ? "The tunnel is closed." : answer.status === 404 ? "That tunnel had ended already." : `It was not closed: ${answer.status} ${visible((await answer.json().catch(() => ({}))).detail)}`;
      } catch {
        said.textContent = "It was not closed: sallyport cannot be reached.";
      }
      said.hidden = false;
      document.activeElement?.blur();
      refresh().catch(() => {});
    });
  }

  // Live decisions.
  const maxRows = 200;
  const rows = $("#rows");
  const live = () => {
    const state = $("#live-state"), pause = $("#pause"), form = $("#live-filter"), blank = $("#row").content.firstElementChild;
    let source = null, paused = false, waiting = [], missed = 0, lost = 0, retry = 0, later = 0, turns = 0;
    let seen = Math.max(0, ...$$("tr", rows).map((row) => Number(row.dataset.seq)));

    const query = () => {
      const q = new URLSearchParams(new FormData(form));
      for (const [k, v] of [...q]) if (!v) q.delete(k);
      return q;
    };
    const say = () => {
      const lack = lost ? `, ${lost.toLocaleString("en-GB")} left out` : "";
      state.className = "badge " + (paused ? "warn" : source?.readyState === 1 ? "good" : "bad");
      state.textContent = paused ? `paused, ${missed.toLocaleString("en-GB")} new` : source?.readyState === 1 ? "live" + lack : "connecting";
      pause.textContent = paused ? "Continue" : "Pause";
      pause.setAttribute("aria-pressed", String(paused));
    };
    const target = (d) => !d.port ? d.name : d.name.includes(":") && !d.name.startsWith("[") ? `[${d.name}]:${d.port}` : `${d.name}:${d.port}`;
    const explain = (d) => {
      const q = new URLSearchParams({ source: d.src, target: d.event === "http" ? `http://${target(d)}/` : target(d) });
      if (d.user) q.set("user", d.user);
      if (d.event === "dns") q.set("dns", d.qtype || "A");
      else if (d.sni && d.event !== "http") q.set("sni", d.sni);
      return `/explain?${q}`;
    };
    const show = (d, fresh) => {
      const row = blank.cloneNode(true);
      row.dataset.seq = d.seq;
      const set = (field, text) => { $(`[data-field=${field}]`, row).textContent = visible(text); };
      set("time", new Date(d.time).toISOString().slice(11, 19));
      set("verdict", d.verdict);
      const verdict = $("[data-field=verdict]", row);
      verdict.className = "badge";
      if (/^(allow|deny|observe)$/.test(d.verdict)) verdict.classList.add(d.verdict);
      set("src", d.src);
      set("group", d.group);
      set("what", d.qtype || d.method || d.event);
      set("target", target(d));
      for (const field of ["target", "rule", "group"]) {
        const cell = $(`[data-field=${field}]`, row);
        cell.title = cell.textContent;
      }
      set("reason", d.reason);
      $("[data-field=reason]", row).setAttribute("href", explain(d));
      set("rule", d.rule);
      set("bytes", d.bytes_up || d.bytes_down ? `${size(d.bytes_up)} / ${size(d.bytes_down)}` : "");
      set("ms", Math.round(d.duration_ms).toLocaleString("en-GB"));
      if (fresh) row.classList.add("new");
      return row;
    };
    const add = (all, fresh) => { // newest last
      const list = all.filter((d) => d.seq > seen);
      if (!list.length) return;
      seen = Math.max(...list.map((d) => d.seq));
      rows.prepend(...list.reverse().map((d) => show(d, fresh)));
      while (rows.children.length > maxRows) rows.lastElementChild.remove();
      $("#no-rows").hidden = true;
    };
    // Decisions are drawn at most some times a second, however fast they come.
    let drawing = false;
    const draw = () => {
      if (drawing || paused) return;
      drawing = true;
      setTimeout(() => {
        drawing = false;
        if (paused) return;
        add(waiting.splice(0), true);
        say();
      }, 150);
    };
    const take = (d) => {
      waiting.push(d);
      if (waiting.length > maxRows) waiting.shift();
      if (paused) {
        missed++;
        say();
      } else draw();
    };
    // start shows the newest and follows from there: at a change of the filter, and
    // whenever the stream has broken, so that nothing is missed and nothing counted on
    // that a restart of the gate would have changed.
    const start = async () => {
      clearTimeout(later);
      source?.close();
      source = null;
      say();
      const turn = ++turns;
      try {
        const q = query();
        q.set("limit", "60");
        const answer = await ask(`/api/v1/decisions?${q}`);
        if (!answer.ok) throw new Error(String(answer.status));
        const body = await answer.json();
        if (turn !== turns) return;
        if (!paused) {
          rows.replaceChildren();
          waiting = [];
          seen = 0;
          add(body.decisions.toReversed(), false);
          $("#no-rows").hidden = body.decisions.length > 0;
        }
        follow(body.cursor);
      } catch {
        if (turn === turns) again();
      }
    };
    const again = () => {
      clearTimeout(later);
      later = setTimeout(start, 1000 * 2 ** Math.min(retry++, 4));
    };
    const follow = (cursor) => {
      const q = query();
      q.set("after", cursor);
      const mine = source = new EventSource(here(`/api/v1/decisions?${q}`));
      mine.onopen = () => {
        retry = 0;
        reached(true);
        say();
      };
      const parse = (work) => (e) => {
        let d;
        try { d = JSON.parse(e.data); } catch { return; }
        if (mine === source) work(d);
      };
      mine.addEventListener("decision", parse(take));
      mine.addEventListener("lost", parse((d) => {
        lost += d.lost;
        say();
      }));
      mine.onerror = () => {
        if (mine !== source) return;
        mine.close();
        reached(false);
        again();
        say();
      };
      say();
    };
    pause.addEventListener("click", () => {
      paused = !paused;
      if (!paused) {
        missed = 0;
        draw();
      }
      say();
    });
    let typed = 0;
    const changed = () => {
      const q = query().toString();
      history.replaceState(null, "", (q ? `/?${q}` : "/") + (q ? "#live" : ""));
      start();
    };
    form.addEventListener("submit", (e) => {
      e.preventDefault();
      clearTimeout(typed);
      changed();
    });
    form.addEventListener("change", changed);
    form.addEventListener("input", (e) => {
      if (e.target.type !== "search") return;
      clearTimeout(typed);
      typed = setTimeout(changed, 400);
    });
    addEventListener("pagehide", () => source?.close());
    addEventListener("pageshow", (e) => { if (e.persisted) start(); });
    if (rows.dataset.cursor) follow(rows.dataset.cursor);
    else start();
  };

  // Charts.
  const charts = () => {
    const plots = new Map();
    const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    const kinds = {
      decisions: { data: (s) => [s.decisions.allow, s.decisions.deny, s.decisions.observe], series: [["allow", "--allow"], ["deny", "--deny"], ["observe", "--observe"]], value: short },
      bytes: { data: (s) => [s.bytes_down, s.bytes_up], series: [["down", "--down"], ["up", "--up"]], value: size, incrs: Array.from({ length: 50 }, (_, i) => 2 ** i) },
      dns: { data: (s) => [s.dns_queries.allow, s.dns_queries.deny, s.dns_queries.observe], series: [["allow", "--allow"], ["deny", "--deny"], ["observe", "--observe"]], value: short },
    };
    const dashes = [[], [6, 3], [2, 3]]; // lines differ by more than their colour
    const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", timeZone: "UTC" });
    const exact = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit", timeZone: "UTC" });
    const width = (box) => Math.max(240, box.clientWidth);
    const height = 178;
    const newest = (u) => u.setLegend({ idx: u.data[0].length - 1 }); // where no pointer says another
    const make = (box, kind, data) => {
      const axis = { stroke: colour("--dim"), grid: { stroke: colour("--line-soft"), width: 1 }, ticks: { stroke: colour("--line"), width: 1, size: 4 }, font: "12px system-ui, sans-serif" };
      return new uPlot({
        width: width(box), height,
        tzDate: (t) => uPlot.tzDate(new Date(t * 1000), "UTC"),
        cursor: { y: false, points: { size: 6 }, drag: { x: false, y: false } },
        legend: { live: true },
        hooks: { setCursor: [(u) => { if (u.cursor.idx == null) newest(u); }] },
        scales: { x: { time: true, range: (_, min, max) => max == null ? [Date.now() / 1000 - 600, Date.now() / 1000] : [Math.min(min, max - 600), max] }, y: { range: (_, __, max) => [0, max > 0 ? max * 1.1 : 1] } },
        axes: [
          { ...axis, values: (_, ticks, __, ___, step) => ticks.map((t) => (step < 60 ? exact : clock).format(t * 1000)), space: 70, size: 34 },
          { ...axis, values: (_, ticks) => ticks.map(kind.value), size: 66, space: 36, ...(kind.incrs && { incrs: kind.incrs }) },
        ],
        series: [
          { label: "at", value: (_, t) => t == null ? "–" : exact.format(t * 1000) },
          ...kind.series.map(([label, name], i) => ({ label, stroke: colour(name), fill: i ? undefined : colour(name) + "1c", width: 1.75, dash: dashes[i], points: { show: false }, value: (_, v) => v == null ? "–" : kind.value(v) })),
        ],
      }, data, box);
    };
    let latest = null;
    const draw = (again) => {
      if (!latest || typeof uPlot === "undefined") return;
      for (const box of $$("[data-chart]")) {
        const kind = kinds[box.dataset.chart];
        const data = [latest.time, ...kind.data(latest)];
        if (again && plots.has(box)) {
          plots.get(box).destroy();
          plots.delete(box);
        }
        if (plots.has(box)) plots.get(box).setData(data);
        else plots.set(box, make(box, kind, data));
        if (plots.get(box).cursor.idx == null) newest(plots.get(box));
      }
    };
    const load = async () => {
      if (document.hidden && latest) return;
      const answer = await ask("/api/v1/series?minutes=60");
      if (!answer.ok) return;
      latest = await answer.json();
      draw(false);
    };
    for (const box of $$("[data-chart]")) box.dataset.empty = "no numbers yet";
    new ResizeObserver(() => {
      for (const [box, plot] of plots) if (plot.width !== width(box)) plot.setSize({ width: width(box), height });
    }).observe($("#charts"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw(true));
    load().catch(() => {});
    repeat(load, 10000);
  };

  narrow();
  if (rows) live();
  if ($("#charts")) charts();
  repeat(refresh, refreshEvery);
})();
