# Targets for people; `make` lists them. POSIX make: no GNU extensions, so that
# any make of any BSD or Linux runs it. Variables can be set on the command line:
# make fuzz FUZZTIME=1m.

PKG = ./...
FUZZTIME = 20s
SOAKTIME = 10m
BENCH = .
COUNT = 1
UPLOT = 1.6.32
OUT = bin/sallyport
LINT = go tool -modfile=.ci/tools.mod golangci-lint

.POSIX:
.PHONY: help build test lint fuzz soak bench e2e generate uplot tools

help: ## list the targets
	@sed -n 's/^\([a-z0-9]*\):.*## \(.*\)/  \1	\2/p' Makefile | expand -t 12

build: ## static binary in bin/, stamped with version and revision
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w \
		-X main.version=$$(git describe --tags --always --dirty 2>/dev/null || echo dev) \
		-X main.revision=$$(git rev-parse HEAD 2>/dev/null || echo unknown)" \
		-o $(OUT) ./cmd/sallyport

test: tools ## every test, with the race detector
	go test -race -timeout 10m $(PKG)

lint: ## go vet, for other systems too, and formatting and linters of .golangci.yml
	go vet $(PKG)
	GOOS=darwin go vet $(PKG)
	GOOS=freebsd go vet $(PKG)
	$(LINT) run

fuzz: ## every fuzz target for FUZZTIME each (20s)
	@set -e; for pkg in $$(go list $(PKG)); do \
		for target in $$(go test -list '^Fuzz' $$pkg | grep '^Fuzz' || :); do \
			echo "== $$pkg $$target"; \
			go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) $$pkg; \
		done; \
	done

soak: ## good, slow, broken and hostile clients against the built binary for SOAKTIME (10m)
	SOAKTIME=$(SOAKTIME) go test -count 1 -timeout 24h -v -run '^TestSoak$$' ./test/e2e

bench: ## benchmarks with allocations, in the format benchstat reads
	go test -run '^$$' -bench '$(BENCH)' -benchmem -count $(COUNT) $(PKG)

e2e: tools ## only the end-to-end tests: real curl and dig against the built binary
	go test -race -count 1 -v ./test/e2e

generate: ## JSON Schemas in configs/, from the Go types
	go generate $(PKG)

uplot: ## the dashboard's charting library again, from its npm package (needs npm)
	dir=$$(mktemp -d) && trap 'rm -r "$$dir"' EXIT && \
	(cd "$$dir" && npm pack --silent uplot@$(UPLOT) >/dev/null && tar -xzf uplot-$(UPLOT).tgz) && \
	cp "$$dir/package/dist/uPlot.iife.min.js" "$$dir/package/dist/uPlot.min.css" internal/dashboard/static/ && \
	cp "$$dir/package/LICENSE" internal/dashboard/static/uPlot.LICENSE

# The race detector needs a C compiler, the end-to-end tests real clients. On
# Debian and its relatives what is missing is installed if we may; elsewhere the
# message says what to install. The dashboard's test needs chromium, and is skipped
# without it. promtool is welcome: without it its tests are skipped, too. Its package
# would start a Prometheus, which nobody asked for.
tools:
	@missing=; \
	command -v cc >/dev/null 2>&1 || command -v gcc >/dev/null 2>&1 || missing="$$missing gcc libc6-dev"; \
	command -v curl >/dev/null 2>&1 || missing="$$missing curl"; \
	command -v dig >/dev/null 2>&1 || missing="$$missing dnsutils"; \
	command -v kdig >/dev/null 2>&1 || missing="$$missing knot-dnsutils"; \
	command -v openssl >/dev/null 2>&1 || missing="$$missing openssl"; \
	command -v calamaris >/dev/null 2>&1 || missing="$$missing calamaris"; \
	command -v sarg >/dev/null 2>&1 || missing="$$missing sarg"; \
	command -v luajit >/dev/null 2>&1 || missing="$$missing luajit"; \
	command -v chromium >/dev/null 2>&1 || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null 2>&1 || missing="$$missing chromium"; \
	test -e /etc/ssl/certs/ca-certificates.crt || test ! -e /etc/debian_version || missing="$$missing ca-certificates"; \
	welcome=; command -v promtool >/dev/null 2>&1 || welcome=prometheus; \
	test -n "$$missing$$welcome" || exit 0; \
	if command -v apt-get >/dev/null 2>&1 && test "$$(id -u)" = 0; then \
		export DEBIAN_FRONTEND=noninteractive; \
		apt-get update -qq || test -z "$$missing" || exit 1; \
		test -z "$$missing" || apt-get install -y -qq --no-install-recommends $$missing || exit 1; \
		test -n "$$welcome" || exit 0; \
		policy=/usr/sbin/policy-rc.d; \
		test -e $$policy || { trap 'rm -f /usr/sbin/policy-rc.d' EXIT; printf '#!/bin/sh\nexit 101\n' >$$policy; chmod 755 $$policy; }; \
		apt-get install -y -qq --no-install-recommends $$welcome || echo "without promtool its tests are skipped" >&2; \
		test ! -d /run/systemd/system || systemctl disable -q $$welcome || :; \
	elif test -n "$$missing"; then \
		echo "make test needs a C compiler, curl, dig, kdig, openssl, calamaris, sarg and luajit. Missing here (Debian's package names):$$missing" >&2; \
		exit 1; \
	fi
