-- Events of sallyport for Fluent Bit's lua filter (LuaJIT): ecs() makes them
-- documents of the Elastic Common Schema (8.x), ocsf() events of the Open
-- Cybersecurity Schema Framework (1.5). docs/logging.md has the mapping as a table.
-- Messages, which have "level" instead of "event", pass through as they are.

-- What neither schema has a place for keeps its name, in ECS below "sallyport", in
-- OCSF below "unmapped".
local function keep(to, e, ...)
  for _, k in ipairs({...}) do to[k] = e[k] end
end

-- nonempty returns t, or nil if nothing is in it.
local function nonempty(t)
  if next(t) == nil then return nil end
  return t
end

local function is_address(s)
  return s ~= nil and (s:match("^%d+%.%d+%.%d+%.%d+$") ~= nil or s:find(":", 1, true) ~= nil)
end

local function addresses(list)
  local ips, data = {}, {}
  for _, a in ipairs(list or {}) do
    if is_address(a) then ips[#ips + 1] = a end
    data[#data + 1] = a
  end
  return ips, data
end

local function sum(a, b)
  if a == nil and b == nil then return nil end
  return (a or 0) + (b or 0)
end

function ecs(tag, timestamp, e)
  if e.event == nil then return 0, timestamp, e end
  local verdict = { allow = "allowed", observe = "allowed", deny = "denied" }
  local d = {
    ["@timestamp"] = e.time,
    ecs = { version = "8.17.0" },
    event = {
      kind = "event", dataset = "sallyport.events", module = "sallyport", action = e.event, id = e.id, reason = e.reason,
    },
    observer = { type = "proxy", vendor = "sallyport", product = "sallyport", name = e.node },
    sallyport = {},
  }
  if e.event == "config" then
    d.event.category, d.event.type = { "configuration" }, { "change" }
    d.event.outcome = e.ok and "success" or "failure"
    keep(d.sallyport, e, "what")
  else
    d.event.category, d.event.type = { "network" }, { "connection", verdict[e.verdict] }
    d.event.outcome = e.verdict == "deny" and "failure" or "success"
    d.event.duration = e.duration_ms and math.floor(e.duration_ms * 1e6)
    d.network = {
      direction = "egress", transport = e.event ~= "dns" and "tcp" or nil,
      protocol = e.event == "dns" and "dns" or e.tls_version and "tls" or e.event == "http" and "http" or nil,
      bytes = sum(e.bytes_up, e.bytes_down),
    }
    d.source = nonempty({ ip = e.src, port = e.src_port, bytes = e.bytes_up })
    d.destination = nonempty({ ip = e.dst, port = e.port, bytes = e.bytes_down })
    if e.event == "dns" then
      local ips, data = addresses(e.answers)
      local answers = {}
      for i, a in ipairs(data) do answers[i] = { data = a } end
      d.dns = {
        question = { name = e.name, type = e.qtype }, response_code = e.rcode,
        resolved_ip = nonempty(ips), answers = nonempty(answers),
      }
    elseif is_address(e.name) then
      d.destination = d.destination or {}
      d.destination.ip = d.destination.ip or e.name
    elseif e.name then
      d.destination = d.destination or {}
      d.destination.domain = e.name
    end
    d.http = nonempty({
      request = e.method and { method = e.method }, response = e.status and { status_code = e.status },
    })
    if e.tls_version or e.sni then
      d.tls = { version = e.tls_version, client = nonempty({ server_name = e.sni }) }
    end
  end
  d.rule = nonempty({ name = e.rule, ruleset = e.group, version = e.policy })
  d.user = e.user and { name = e.user }
  d.user_agent = e.user_agent and { original = e.user_agent }
  d.error = e.error and { message = e.error }
  keep(d.sallyport, e, "verdict", "mode", "listener", "vpc_endpoint", "parent", "alpn", "ech", "post_quantum", "ja4", "dns_ms", "connect_ms")
  d.sallyport = nonempty(d.sallyport)
  return 2, timestamp, d -- 2: the time stays
end

-- Names of activities of HTTP Activity (4002) by method.
local http_activity = {
  CONNECT = 1, DELETE = 2, GET = 3, HEAD = 4, OPTIONS = 5, POST = 6, PUT = 7, TRACE = 8, PATCH = 9,
}

local rcodes = {
  NOERROR = 0, FORMERR = 1, SERVFAIL = 2, NXDOMAIN = 3, NOTIMP = 4, REFUSED = 5,
}

-- millis reads 2026-03-04T05:06:07.089Z into milliseconds since 1970. (Days from a
-- date: H. Hinnant, chrono-Compatible Low-Level Date Algorithms.)
local function millis(s)
  local y, m, d, h, min, sec, ms = s:match("^(%d+)-(%d+)-(%d+)T(%d+):(%d+):(%d+)%.(%d+)Z$")
  if not y then return nil end
  y, m, d = tonumber(y), tonumber(m), tonumber(d)
  if m <= 2 then y = y - 1 end
  local era = math.floor(y / 400)
  local yoe = y - era * 400
  local doy = math.floor((153 * (m + (m > 2 and -3 or 9)) + 2) / 5) + d - 1
  local days = era * 146097 + yoe * 365 + math.floor(yoe / 4) - math.floor(yoe / 100) + doy - 719468
  return ((days * 24 + tonumber(h)) * 60 + tonumber(min)) * 60000 + tonumber(sec) * 1000 + tonumber(ms)
end

function ocsf(tag, timestamp, e)
  if e.event == nil or e.event == "config" then return 0, timestamp, e end
  local class, activity = 4001, 6 -- Network Activity: Traffic
  if e.event == "dns" then
    class, activity = 4003, 6 -- DNS Activity: Traffic
  elseif e.event == "connect" or e.event == "http" then
    class, activity = 4002, http_activity[e.method or "CONNECT"] or 99
  end
  local deny, observe = e.verdict == "deny", e.verdict == "observe"
  local o = {
    metadata = {
      version = "1.5.0", uid = e.id, original_time = e.time, profiles = { "host", "security_control" },
      product = { name = "sallyport", vendor_name = "sallyport" },
    },
    category_uid = 4, class_uid = class, activity_id = activity, type_uid = class * 100 + activity,
    time = millis(e.time or ""), duration = e.duration_ms and math.floor(e.duration_ms),
    severity_id = deny and 3 or observe and 2 or 1, -- Medium, Low, Informational
    status_id = deny and 2 or 1, status_detail = e.reason, -- Failure, Success
    action_id = deny and 2 or 1, -- Denied, Allowed
    disposition_id = deny and 2 or observe and 17 or 1, -- Blocked, Logged, Allowed
    device = e.node and { hostname = e.node, type_id = 0 },
    actor = e.user and { user = { name = e.user } },
    src_endpoint = nonempty({ ip = e.src, port = e.src_port }),
    dst_endpoint = nonempty({ ip = e.dst, port = e.port }),
    connection_info = { direction_id = 2, protocol_name = e.event ~= "dns" and "tcp" or nil }, -- Outbound
    policy = nonempty({ name = e.group, version = e.policy }),
    firewall_rule = e.rule and { name = e.rule },
    message = e.error,
    unmapped = {},
  }
  if e.bytes_up or e.bytes_down then
    o.traffic = { bytes_out = e.bytes_up, bytes_in = e.bytes_down, bytes = sum(e.bytes_up, e.bytes_down) }
  end
  if e.event == "dns" then
    local _, data = addresses(e.answers)
    local answers = {}
    for i, a in ipairs(data) do answers[i] = { rdata = a } end
    o.query = { hostname = e.name, type = e.qtype }
    o.rcode, o.rcode_id, o.answers = e.rcode, e.rcode and (rcodes[e.rcode] or 99), nonempty(answers)
  elseif e.name then
    o.dst_endpoint = o.dst_endpoint or {}
    if is_address(e.name) then
      o.dst_endpoint.ip = o.dst_endpoint.ip or e.name
    else
      o.dst_endpoint.hostname = e.name
    end
  end
  if class == 4002 then
    o.http_request = nonempty({ http_method = e.method, user_agent = e.user_agent })
    o.http_response = e.status and { code = e.status }
  end
  if e.parent then
    o.proxy_endpoint = { hostname = e.parent }
    table.insert(o.metadata.profiles, 2, "network_proxy")
  end
  if e.tls_version or e.sni then o.tls = { version = e.tls_version or "", sni = e.sni } end
  if e.ja4 then o.ja4_fingerprint_list = { { type_id = 1, value = e.ja4 } } end
  keep(o.unmapped, e, "event", "verdict", "mode", "listener", "vpc_endpoint", "alpn", "ech", "post_quantum", "dns_ms", "connect_ms")
  return 2, timestamp, o
end
