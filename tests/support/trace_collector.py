"""A collector of OpenTelemetry spans, over HTTP, for servers under test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["TraceCollector", "trace_collector"]


class TraceCollector:
    """What has arrived at `url`; `variables` make vLLM send it there soon, and over HTTP."""

    variables = {
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "200",  # milliseconds
    }

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1/traces"
        self.spans: list[tuple[str, dict[str, Any]]] = []

    def add(self, body: bytes) -> None:
        """Take one request to export spans: their names and attributes."""
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
            ExportTraceServiceRequest,
        )

        request = ExportTraceServiceRequest.FromString(body)
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    values = {
                        each.key: getattr(each.value, each.value.WhichOneof("value"))
                        for each in span.attributes
                    }
                    self.spans.append((span.name, values))


@contextmanager
def trace_collector() -> Iterator[TraceCollector]:
    """Collect until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.add(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        collector = TraceCollector(http.server_address[1])
        serving = threading.Thread(target=http.serve_forever)
        serving.start()
        try:
            yield collector
        finally:
            http.shutdown()
            serving.join()
