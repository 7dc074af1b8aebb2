# The image holds the program, the certificate authorities and nothing else: no
# shell, no package manager, no user but a number.
#
#   docker build -t sallyport:dev --build-arg VERSION=$(git describe --tags --always) .
#   docker run --rm --read-only --cap-drop=ALL --network=host sallyport:dev
#
# Without arguments it serves loopback from the embedded configuration, which is
# what a sidecar in the application's network namespace wants. To serve a network,
# mount a folder with sallyport.yaml and policy.yaml and name it:
#
#   docker run --rm --read-only --cap-drop=ALL -p 3128:3128 -p 53:53/udp -p 53:53 \
#     -v "$PWD/config:/etc/sallyport:ro" sallyport:dev run --config /etc/sallyport/sallyport.yaml

# The version in go.mod; test/container_test.go keeps the two together.
ARG GO_VERSION=1.26.8
FROM golang:${GO_VERSION} AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=dev
ARG REVISION=unknown
RUN CGO_ENABLED=0 go build -trimpath -buildvcs=false \
      -ldflags "-s -w -X main.version=${VERSION} -X main.revision=${REVISION}" \
      -o /sallyport ./cmd/sallyport

FROM scratch
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /sallyport /sallyport
USER 65532:65532
EXPOSE 3128 53/udp 53/tcp 9128
# SIGTERM drains for timeouts.drain (30s); give the engine as long: --stop-timeout 45.
STOPSIGNAL SIGTERM
ENTRYPOINT ["/sallyport"]
CMD ["run"]
