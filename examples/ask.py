"""Ask a running SGLang server: its greedy tokens, their log-probs, and its time per output token.

python ask.py URL [--tokens 8192] [--new 64] [--requests 1] [--save FILE] [--against FILE]

Prompts are made-up token ids, the same for the same arguments. ``--against`` compares with what another server
answered. Standard library only.
"""

import argparse
import json
import random
import statistics
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

GREEDY = {"temperature": 0, "ignore_eos": True}


def post(url, body):
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        return urllib.request.urlopen(request, timeout=1800)
    except urllib.error.HTTPError as problem:
        sys.exit(f"{url}/generate answered {problem.code}: {problem.read().decode(errors='replace')[:500]}")


def tokens_of(url, prompts, count):
    """[[log-prob, token], ...] of every prompt, all in one batch."""
    body = {"input_ids": prompts, "sampling_params": {**GREEDY, "max_new_tokens": count}, "return_logprob": True}
    with post(url, body) as response:
        answers = json.load(response)
    return [[row[:2] for row in answer["meta_info"]["output_token_logprobs"]] for answer in answers]


def gaps_of(url, prompt, count):
    """Seconds between output tokens, over the last half of them."""
    body = {"input_ids": prompt, "sampling_params": {**GREEDY, "max_new_tokens": count}, "stream": True}
    seen = []
    with post(url, body) as response:
        for line in response:
            if line.startswith(b"data: {"):
                seen.append((time.perf_counter(), json.loads(line[6:])["meta_info"]["completion_tokens"]))
    late = seen[len(seen) // 2 :]
    return [(t1 - t0) / (n1 - n0) for (t0, n0), (t1, n1) in pairwise(late) if n1 > n0]


def ask(url, tokens, count, requests):
    rng = random.Random(1)
    prompts = [[rng.randint(300, 10_000) for _ in range(tokens)] for _ in range(requests)]
    outputs = tokens_of(url, prompts, count)  # compiles what is not compiled, and leaves the prompts in the cache
    with ThreadPoolExecutor(requests) as pool:
        gaps = [gap for one in pool.map(lambda prompt: gaps_of(url, prompt, count), prompts) for gap in one]
    if not gaps:
        sys.exit(f"{url} sent its {count} tokens in too few pieces to time them: ask for more with --new")
    return {"asked": [tokens, count, requests], "ms": round(1e3 * statistics.median(gaps), 3), "outputs": outputs}


def compare(before, now):
    """Lines that say how two servers' answers differ."""
    for at, (old, new) in enumerate(zip(before["outputs"], now["outputs"], strict=True)):
        same = next((i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a[1] != b[1]), len(old))
        apart = statistics.fmean(abs(a[0] - b[0]) for a, b in zip(old[:same], new[:same], strict=True)) if same else 0
        line = f"request {at}: the same {same} tokens, log-probs {apart:.4f} apart in the mean"
        if same < len(old):
            (was, token), (is_now, other) = old[same], new[same]
            line += f"; then {other} ({is_now:.4f}) for {token} ({was:.4f})"
        yield line
    yield f"time per output token: {now['ms']} ms, was {before['ms']} ms"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="http://127.0.0.1:30000")
    parser.add_argument("--tokens", type=int, default=8192, help="of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--requests", type=int, default=1, help="at a time")
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep the answers")
    parser.add_argument("--against", type=Path, metavar="FILE", help="answers to compare with")
    args = parser.parse_args()
    before = json.loads(args.against.read_text()) if args.against else None
    asked = [args.tokens, args.new, args.requests]
    if before and before["asked"] != asked:
        parser.error(f"{args.against} was asked for {before['asked']} (tokens, new, requests), not {asked}")
    now = ask(args.url.rstrip("/"), *asked)
    if args.save:
        args.save.write_text(json.dumps(now))
    print(*(compare(before, now) if before else [f"time per output token: {now['ms']} ms"]), sep="\n")


if __name__ == "__main__":
    main()
