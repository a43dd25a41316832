# SPDX-License-Identifier: Apache-2.0
"""A Java virtual machine with a client, compiled code, a collector and threads goes on as if nothing had been."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from tests.process.test_real_programs import LONG, answers, free_port, serving

pytestmark = [pytest.mark.root, pytest.mark.tool("javac"), pytest.mark.tool("java")]

SERVER = """
import java.io.*;
import java.net.*;
import java.util.*;
import java.util.concurrent.*;
import java.util.concurrent.atomic.*;

public class Server {
    static final AtomicLong ticks = new AtomicLong();
    static final Map<Long, byte[]> kept = new ConcurrentHashMap<>();

    static long work(long number) {
        long sum = 0;
        for (int i = 0; i < 20000; i++) {
            byte[] garbage = new byte[256];
            garbage[i % 256] = (byte) number;
            sum += garbage[i % 256] + (i % 3);
        }
        kept.put(number, ("value " + number).getBytes());
        return sum;
    }

    public static void main(String[] words) throws Exception {
        ScheduledExecutorService clock = Executors.newScheduledThreadPool(2);
        clock.scheduleAtFixedRate(ticks::incrementAndGet, 0, 2, TimeUnit.MILLISECONDS);
        ExecutorService pool = Executors.newFixedThreadPool(3);
        ServerSocket listener = new ServerSocket(Integer.parseInt(words[0]), 8, InetAddress.getLoopbackAddress());
        while (true) {
            Socket client = listener.accept();
            pool.submit(() -> { serve(client); return null; });
        }
    }

    static void serve(Socket client) throws Exception {
        BufferedReader in = new BufferedReader(new InputStreamReader(client.getInputStream()));
        PrintStream out = new PrintStream(client.getOutputStream(), true);
        for (String line = in.readLine(); line != null; line = in.readLine()) {
            long number = Long.parseLong(line), before = ticks.get(), right = 0;
            long sum = work(number);
            for (Map.Entry<Long, byte[]> entry : kept.entrySet())
                if (new String(entry.getValue()).equals("value " + entry.getKey())) right++;
            while (ticks.get() < before + 3) Thread.sleep(1);
            out.println(sum + " " + right + " " + kept.size());
        }
    }
}
"""


@pytest.mark.parametrize("collector", ["Serial", "G1", "Parallel"] if LONG else ["G1"])
def test_a_virtual_machine_with_a_client(tmp_path: Path, collector: str) -> None:
    (tmp_path / "Server.java").write_text(SERVER)
    subprocess.run(["javac", "Server.java"], cwd=tmp_path, check=True, timeout=120)
    port = free_port()
    # The file of its performance data may be removed by any other one that starts meanwhile.
    options = ["-XX:-UsePerfData", f"-XX:+Use{collector}GC", "-Xmx64m"]
    command = ["java", *options, "-cp", tmp_path, "Server", str(port)]
    with (
        serving(tmp_path, *command, ready=lambda: answers(port)) as program,
        socket.create_connection(("127.0.0.1", port), timeout=60) as client,
        client.makefile("rw") as told,
    ):
        for number in range(1, 60):
            told.write(f"{number}\n")
            told.flush()
            total, right, kept = map(int, told.readline().split())
            assert (total, right, kept) == (20000 * number + 19999, number, number)
            if number in ((20, 40) if LONG else (30,)):
                program.restore(program.dump("--tcp", "established"))
