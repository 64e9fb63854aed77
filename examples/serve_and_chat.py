"""Serve a flash model and talk to it with the `openai` client.

    pip install ".[serve]"
    python examples/serve_and_chat.py                                      # the small model beside this file
    python examples/serve_and_chat.py facebook/opt-1.3b --memory-budget 2GiB

What follows the model goes to `hf-flash serve`. That model needs no chat template of its own here: see chat_template.jinja.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

from openai import OpenAI

HERE = Path(__file__).parent


def main(model: str, *arguments: str) -> None:
    template = HERE / "chat_template.jinja"
    command = [sys.executable, "-m", "hf_flash", "serve", model, "--port=0", f"--chat-template={template}", *arguments]
    server = subprocess.Popen([*command, "--log-level=warning"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = next((line.split()[-1] for line in server.stdout if line.startswith("base URL")), None)
        if url is None:
            sys.exit("the server did not start")
        chat(url)
    finally:
        server.send_signal(signal.SIGINT)  # as Ctrl-C
        server.wait()


def chat(url: str) -> None:
    client = OpenAI(base_url=url, api_key="none")
    model = client.models.list().data[0].id
    messages = []
    for question in ("In the beginning", "And the people said unto Moses,"):
        messages.append({"role": "user", "content": question})
        print(f"> {question}")
        stream = client.chat.completions.create(model=model, messages=messages, max_tokens=24, temperature=0, stream=True)
        answer = ""
        for chunk in stream:
            text = chunk.choices[0].delta.content or ""
            print(text, end="", flush=True)
            answer += text
        print("\n")
        messages.append({"role": "assistant", "content": answer})

    with urllib.request.urlopen(url.removesuffix("/v1") + "/flash/stats") as answered:
        found = json.load(answered)
    print(f"{found['tokens']} tokens, {found['read_bytes_per_token'] / 1e3:.0f} kB read for each, hits {found['hit_rate']:.0%}")
    print(f"{found['dram_bytes'] / 1e6:.1f} MB of weights in DRAM, {found['dense_bytes'] / 1e6:.1f} MB in the dense model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or Hub repository (default: the small model beside this file)")
    found, others = parser.parse_known_args()
    main(*([found.model, *others] if found.model else [str(HERE / "tiny-opt"), "--memory-budget=10MB", *others]))
