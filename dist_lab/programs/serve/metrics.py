"""What /metrics says, in Prometheus' text format 0.0.4.

A line is `name value`, after lines that tell its meaning and whether it only grows (a counter):
https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from dist_lab.programs.serve.router import Router

TYPE = "text/plain; version=0.0.4; charset=utf-8"
COUNTERS = {
    "prompt_tokens": "tokens of the prompts that were accepted",
    "generated_tokens": "tokens that were generated",
    "ended_length": "texts that have reached their max_tokens",
    "ended_stop": "texts that have ended by a stop string or the end token",
    "ended_failed": "texts that got an error, because their logits are not finite",
    "cancelled": "texts that were cancelled, because their client had gone or the server stops",
}
ENGINE = {  # field of inference.engine.Counts -> name, kind, meaning
    "waiting": ("texts_waiting", "gauge", "texts that wait in the engine, after the last step"),
    "running": ("texts_running", "gauge", "texts that have blocks and grow"),
    "free": ("blocks_free", "gauge", "blocks of the cache that are free"),
    "used": ("blocks_used", "gauge", "blocks of the cache that texts have"),
    "empty": ("empty_places", "gauge", "places for a token in used blocks that have none"),
    "tokens": ("step_tokens", "gauge", "tokens of the last step"),
    "preemptions": ("preemptions_total", "counter", "texts that lost their blocks for others"),
    "cached": ("cached_prompt_tokens_total", "counter", "tokens of prompts found in the cache"),
}


def metrics(router: Router, answers: dict[tuple[str, int], int]) -> str:
    """Returns the text.

    Args:
        answers: (path, status) -> how many were sent.
    """
    lines = []

    def add(name: str, kind: str, help: str, *values: tuple[str, float]) -> None:
        full = f"dist_lab_{name}"
        lines.append(f"# HELP {full} {help}")
        lines.append(f"# TYPE {full} {kind}")
        lines.extend(f"{full}{suffix} {value}" for suffix, value in values)

    rows = [
        (f'{{path="{path}",status="{status}"}}', count)
        for (path, status), count in sorted(answers.items())
    ]
    add("answers_total", "counter", "answers to requests, by path and status", *rows)
    for name, help in COUNTERS.items():
        add(f"{name}_total", "counter", help, ("", router.totals[name]))
    add(
        "time_to_first_token_seconds", "summary", "from a request to its first token",
        ("_sum", router.totals["first_token_ms"] / 1000),
        ("_count", router.totals["first_tokens"]),
    )  # fmt: skip
    add("open_texts", "gauge", "texts that wait or run", ("", router.open_texts))
    for count, (name, kind, help) in ENGINE.items():
        add(name, kind, help, ("", router.counts.get(count, 0)))
    return "\n".join(lines) + "\n"
