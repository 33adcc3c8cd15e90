"""A server that answers W&B's real client as far as a run of plain numbers needs: opened, resumed, streamed, finished.

It keeps what the client sends, and says of a run that it has what a W&B server says: its last row. It knows nothing
of accounts, projects, artifacts, media, or of how W&B's own server stores and draws what it gets.
"""

import gzip
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = 40 * "a"


@dataclass
class Run:
    """What a client has sent of one run. `ends` are the exit statuses that it gave, `marks` the states in between."""

    project: str
    entity: str | None
    title: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    preempting: int = 0

    @property
    def steps(self) -> list[int]:
        return [row["_step"] for row in self.rows]


class Server:
    """Listens on a free port of this machine. `broken` answers the stream of a run with this HTTP status instead."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.broken: int | None = None
        self.requests: list[str] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def variables(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    @contextmanager
    def running(self):
        thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()
            thread.join()

    def answer(self, path: str, data: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path.endswith("/file_stream"):
            return self._stream(path.split("/")[-2], data)
        query, variables = data.get("query", ""), data.get("variables") or {}
        self.requests.append(query.split("(")[0].strip())
        if "RunResumeStatus" in query:
            return 200, {"data": {"model": {**_ids("pipeline"), "bucket": self._bucket(variables["name"])}}}
        if "UpsertBucket" in query:
            return 200, {"data": {"upsertBucket": self._upsert(variables)}}
        if "CreateRunFiles" in query:
            return 200, {"data": {"createRunFiles": {"runID": "id", "uploadHeaders": [], "files": []}}}
        return 200, {"data": {}}

    def _bucket(self, name: str) -> dict[str, Any] | None:
        run = self.runs.get(name)
        if run is None:
            return None
        tail = json.dumps([json.dumps(row) for row in run.rows[-1:]])
        return {
            "id": name,
            "name": name,
            "summaryMetrics": "{}",
            "displayName": run.title,
            "logLineCount": 0,
            "historyLineCount": len(run.rows),
            "eventsLineCount": 0,
            "historyTail": tail,
            "eventsTail": "[]",
            "config": json.dumps(run.config),
            "tags": [],
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
        }

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        inserted = name not in self.runs
        run = self.runs.setdefault(name, Run(variables["project"], variables["entity"]))
        run.title = variables["displayName"] or run.title
        run.config |= json.loads(variables["config"] or "{}")
        bucket = {
            "id": name,
            "name": name,
            "displayName": run.title,
            "description": "",
            "config": json.dumps(run.config),
        }
        bucket |= {"sweepName": None, "historyLineCount": len(run.rows), "project": _ids(run.project)}
        return {"bucket": bucket, "inserted": inserted}

    def _stream(self, name: str, data: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if self.broken is not None:
            return self.broken, {"error": "broken"}
        run = self.runs[name]
        if history := data.get("files", {}).get("wandb-history.jsonl"):
            del run.rows[history["offset"] :]
            run.rows += [json.loads(line) for line in history["content"]]
        if data.get("preempting"):
            run.preempting += 1
        if data.get("complete"):
            run.ends.append(data["exitcode"])
        return 200, {}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                try:
                    status, answer = server.answer(self.path, json.loads(body))
                except ValueError:  # of its own statistics
                    status, answer = 200, {}
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_PUT = do_GET = do_POST

        return Handler


def _ids(project: str) -> dict[str, Any]:
    return {"id": "p", "name": project, "entity": {"id": "e", "name": "someone"}}
