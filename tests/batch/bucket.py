"""A stand-in for Google Cloud Storage on loopback: objects with generations and preconditions, as in its JSON API."""

import http.server
import json
import threading
import urllib.parse


class Bucket(http.server.ThreadingHTTPServer):
    """Objects in memory: {name: (generation, content)}; url: what tensorstore takes as the service's."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects, self.lock, self.last = {}, threading.Lock(), 1000
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path, query = self._asked()
        name = path.partition("/o/")[2]
        with self.server.lock:
            objects = dict(self.server.objects)
        if not name:
            first, end, prefix = (query.get(key, "") for key in ("startOffset", "endOffset", "prefix"))
            found = [n for n in sorted(objects) if n >= first and (not end or n < end) and n.startswith(prefix)]
            self._answer(200, json.dumps({"items": [self._about(n, objects) for n in found]}).encode())
        elif name not in objects:
            self._answer(404)
        else:
            generation, content = objects[name]
            self._answer(200, content, {"x-goog-generation": str(generation)})

    def do_POST(self):
        _, query = self._asked()
        content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        with self.server.lock:
            now = self.server.objects.get(query["name"], (0, b""))[0]
            wanted = query.get("ifGenerationMatch")
            if wanted is not None and int(wanted) != now:
                self._answer(412)
                return
            self.server.last += 1
            self.server.objects[query["name"]] = self.server.last, content
            self._answer(200, json.dumps(self._about(query["name"], self.server.objects)).encode())

    def _asked(self):
        url = urllib.parse.urlsplit(self.path)
        return urllib.parse.unquote(url.path), dict(urllib.parse.parse_qsl(url.query))

    def _about(self, name, objects):
        return {"name": name, "generation": str(objects[name][0]), "size": str(len(objects[name][1]))}

    def _answer(self, code, content=b"", headers=None):
        self.send_response(code)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass
