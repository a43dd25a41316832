# SPDX-License-Identifier: Apache-2.0
"""Programs that people run, with somebody connected: they go on as if nothing had been."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.process.programs import Program, wait_for

pytestmark = pytest.mark.root

LONG = bool(os.environ.get("STASIS_LONG"))
ENVIRONMENT = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin"}


@contextmanager
def serving(
    directory: Path, *command: str | Path, ready: Callable[[], object], executable: str | None = None
) -> Iterator[Program]:
    """A server in a session of its own, once it answers."""
    with (
        open(directory / "log", "ab") as log,
        subprocess.Popen(
            list(map(str, command)), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=directory,
            start_new_session=True, env=ENVIRONMENT, executable=executable,
        ) as process,
    ):  # fmt: skip
        program = Program(directory, process)
        try:
            wait_for(lambda: process.poll() is not None or ready(), "it does not answer")
            assert process.poll() is None, (directory / "log").read_text()
            yield program
        finally:
            program.end()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def ask(client: socket.socket, *words: str) -> bytes:
    """A command to redis, and the beginning of its answer."""
    parts = [f"${len(word)}\r\n{word}\r\n" for word in words]
    client.sendall(f"*{len(words)}\r\n{''.join(parts)}".encode())
    return client.recv(1 << 16)


@pytest.mark.tool("redis-check-rdb")
def test_redis_with_a_client(tmp_path: Path) -> None:
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes"]
    # Debian's redis-tools has the server under this name, without a service that the installation would start.
    program_file = shutil.which("redis-check-rdb")
    with serving(tmp_path, *command, ready=lambda: answers(port), executable=program_file) as program:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            fill = "for i = 1, 20000 do redis.call('SET', 'key' .. i, string.rep('x', 100)) end"
            assert ask(client, "EVAL", fill, "0") == b"$-1\r\n"
            assert ask(client, "MULTI") == b"+OK\r\n"
            assert ask(client, "SET", "name", "value") == b"+QUEUED\r\n"
            program.restore(program.dump("--tcp", "established"))
            assert b"+OK" in ask(client, "EXEC")
            assert ask(client, "GET", "name") == b"$5\r\nvalue\r\n"
            assert ask(client, "DBSIZE") == b":20001\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            assert ask(client, "GET", "name") == b"$5\r\nvalue\r\n"
        assert b"value" in b"".join(path.read_bytes() for path in tmp_path.rglob("*.aof"))


NGINX = """
daemon off;
worker_processes 3;
error_log error.log;
pid nginx.pid;
events {{ worker_connections 64; }}
http {{
    access_log access.log;
    client_body_temp_path tmp; proxy_temp_path tmp; fastcgi_temp_path tmp; uwsgi_temp_path tmp; scgi_temp_path tmp;
    keepalive_timeout 600;
    server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


@pytest.mark.tool("/usr/sbin/nginx")
def test_nginx_with_workers(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "nginx.conf").write_text(NGINX.format(port=port, root=tmp_path))
    (tmp_path / "page").write_text("served")
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:2]:
        parent.chmod(parent.stat().st_mode | 0o011)
    command = ["nginx", "-p", str(tmp_path), "-c", "nginx.conf", "-g", "user root;"]

    def request(client: socket.socket) -> bytes:
        client.sendall(b"GET /page HTTP/1.1\r\nHost: here\r\n\r\n")
        answer = b""
        while not answer.endswith(b"served"):
            more = client.recv(4096)
            assert more, answer
            answer += more
        return answer

    with serving(tmp_path, *command, ready=lambda: answers(port)) as program:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            request(client)
            wait_for(lambda: len(program.descendants()) == 4, "there are not three workers")
            images = program.dump("--tcp", "established")
            assert len(program.pids) == 4
            program.restore(images)
            assert b"200 OK" in request(client)
        for _ in range(5):
            assert urllib.request.urlopen(f"http://127.0.0.1:{port}/page", timeout=60).read() == b"served"
        children = program.descendants()[1:]
        subprocess.run(["nginx", "-p", tmp_path, "-c", "nginx.conf", "-s", "reload"], check=True, env=ENVIRONMENT,
                       capture_output=True, timeout=60)  # fmt: skip
        wait_for(lambda: not set(children) & set(program.descendants()), "the old workers do not go")
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/page", timeout=60).read() == b"served"


NODE = """
const http = require('http'), fs = require('fs'), {Worker} = require('worker_threads');
let count = 0, ticks = 0;
setInterval(() => { ticks++; }, 5);
const worker = new Worker(`const {parentPort} = require('worker_threads');
    parentPort.on('message', n => parentPort.postMessage(n * n));`, {eval: true});
const server = http.createServer((request, response) => {
    count++;
    worker.once('message', square => fs.writeFile('out', String(square), () => {
        const seen = ticks;
        const wait = setInterval(() => {
            if (ticks > seen) { clearInterval(wait); response.end(`${count} ${square}`); }
        }, 5);
    }));
    worker.postMessage(count);
});
server.keepAliveTimeout = 600000;
server.listen(PORT, '127.0.0.1');
"""


@pytest.mark.tool("node")
def test_node_with_threads(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "server.js").write_text(NODE.replace("PORT", str(port)))
    environment = {"UV_USE_IO_URING": "0"}
    with serving(tmp_path, "env", *(f"{k}={v}" for k, v in environment.items()), "node", "server.js",
                 ready=lambda: answers(port)) as program:  # fmt: skip
        def get() -> str:
            return str(urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60).read().decode())

        assert get() == "1 1"
        program.restore(program.dump("--tcp", "established"))
        assert get() == "2 4"
        assert (tmp_path / "out").read_text() == "4"


POOL = """
import multiprocessing, os, socketserver, sqlite3, sys, time
from pathlib import Path

def square(number):
    return number * number, os.getpid()

class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            results = pool.map(square, range(int(line)))
            self.wfile.write(f"{sum(result for result, _ in results)}\\n".encode())

if __name__ == "__main__":
    pool = multiprocessing.Pool(3)
    with socketserver.ThreadingTCPServer(("127.0.0.1", int(sys.argv[1])), Handler) as server:
        server.serve_forever()
"""


def test_a_python_server_with_processes(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "server.py").write_text(POOL)
    with (
        serving(tmp_path, sys.executable, "server.py", str(port), ready=lambda: answers(port)) as program,
        socket.create_connection(("127.0.0.1", port), timeout=60) as client,
        client.makefile("rw", encoding="ascii", newline="\n") as file,
    ):
        for number in (10, 100) if LONG else (10,):
            file.write(f"{number}\n")
            file.flush()
            assert int(file.readline()) == sum(n * n for n in range(number))
            program.restore(program.dump("--tcp", "established"))
        file.write("1000\n")
        file.flush()
        assert int(file.readline()) == sum(n * n for n in range(1000))


WRITER = """
import sqlite3, time
connection = sqlite3.connect("data.db", isolation_level=None)
connection.execute("PRAGMA journal_mode=%s")
connection.execute("PRAGMA synchronous=OFF")
connection.execute("CREATE TABLE numbers (value INTEGER PRIMARY KEY, text TEXT)")
number = 0
while True:
    connection.execute("BEGIN IMMEDIATE")
    for _ in range(20):
        connection.execute("INSERT INTO numbers VALUES (?, ?)", (number, "x" * 200))
        number += 1
        time.sleep(0.0005)  # most of its time it is within a transaction, and the file does not grow without end
    connection.execute("COMMIT")
"""


@pytest.mark.parametrize("mode", ["DELETE", "WAL"] if LONG else ["WAL"])
def test_sqlite_in_the_middle_of_writing(tmp_path: Path, mode: str) -> None:
    database = tmp_path / "data.db"

    def count() -> int:
        try:
            with sqlite3.connect(database, timeout=60) as connection:
                return int(connection.execute("SELECT count(*) FROM numbers").fetchone()[0])
        except sqlite3.OperationalError:
            return 0

    with serving(tmp_path, sys.executable, "-c", WRITER % mode, ready=lambda: count() > 100) as program:
        for _ in range(10 if LONG else 1):
            images = program.dump("--file-locks")
            program.restore(images)
            before = count()
            wait_for(lambda: count() > before + 40, "it does not write on")  # noqa: B023
        program.end()
        program.process.wait()
        wait_for(lambda: not os.path.exists(f"/proc/{program.pid}"), "it does not end")
    with sqlite3.connect(database) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        total, highest = connection.execute("SELECT count(*), max(value) FROM numbers").fetchone()
        assert total == highest + 1
        assert total % 20 == 0
