"""The built-in model with a real MCP server: it calls the tool in a chat, and the program ends with the server."""

from __future__ import annotations

import json
import os
import sys

import httpx

from tests.mcp_client.test_toolbox import SERVER
from tests.serving.process import serving


def test_the_demo_model_answers_with_what_a_tool_told_it(tmp_path):
    # The one tool that the question is about: which of several a small model takes is not the matter here.
    pid_file = tmp_path / "pid"
    program = f"import os, runpy; open({str(pid_file)!r}, 'w').write(str(os.getpid())); runpy.run_path({SERVER!r}, "
    entry = {"command": sys.executable, "args": ["-c", program + "run_name='__main__')"], "tools": ["get_weather"]}
    (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": {"w": entry}}))
    flags = ["--mcp-config", str(tmp_path / "mcp.json"), "--mcp-in-chat"]
    body = {"model": "default", "temperature": 0, "max_tokens": 100, "include_diagnostics": True}
    body["messages"] = [{"role": "user", "content": "What is the weather in Paris?"}]
    with serving("demo", *flags, log=tmp_path / "log") as server:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            servers = client.get("/v1/mcp/servers").json()["servers"]
            while servers[0]["state"] == "connecting":
                servers = client.get("/v1/mcp/servers").json()["servers"]
            assert servers[0]["state"] == "connected", servers
            answer = client.post("/v1/chat/completions", json=body).json()
            with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as stream:
                lines = [line[6:] for line in stream.iter_lines() if line.startswith("data: {")]
            metrics = client.get("/metrics").text
        message = answer["choices"][0]["message"]
        assert "21" in (message["content"] or "") and not message.get("tool_calls"), answer
        assert {call["tool"] for call in answer["diagnostics"]["mcp"]["calls"]} == {"w__get_weather"}
        deltas = [c["choices"][0]["delta"] for c in map(json.loads, lines) if c["choices"]]
        assert "".join(delta.get("content") or "" for delta in deltas) == message["content"]
        assert 'vllm_mlx:mcp_call_seconds_count{outcome="ok",server="w"}' in metrics
        pid = int(pid_file.read_text())
        os.kill(pid, 0)
        server.signal()
        assert server.wait() == 0 and "Traceback" not in server.output, server.output
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return
    raise AssertionError("the MCP server's process is still there")
