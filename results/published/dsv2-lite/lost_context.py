"""Whose context vLLM 0.26.0's second model runner loses: `lost_context.py`, a replay of its scheduler without a GPU.

Steps have 8,192 tokens: running requests first, then waiting ones as they came, the last one cut to what is left. The
runner sorts a step by the tokens that each request has in it. Of those that are no decodes, only the first tokens are
merged with their context: as many as the requests that have one would have if they stood first.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

BUDGET, MOST = 8192, 256  # tokens and sequences of a step
DECODE = {"FLASH_ATTN_MLA": 512, "FLASHMLA, TRITON_MLA": 1}  # tokens that are still a decode, beside decoding requests
EXACT = (63, 64, 65, 129, 1024, 1100, 8300, 9000, 10000)  # lengths that conf/verify/on_gpu.yaml asks for
PREFIXES, GREEDY = 32, (16, 40, 102, 256)  # and lengths of the prompts that decode meanwhile
# of the closed loops that are published: tokens in, in flight, rounds
LOADS = ((1024, 1, 4), (1024, 16, 4), (1024, 64, 4), (1024, 256, 4), (8192, 16, 2), (32000, 16, 2))


@dataclass
class Request:
    """What has been computed of it."""

    name: str
    prompt: int
    outputs: int
    computed: int = 0
    lost: int = 0  # tokens of context that its worst step did without

    @property
    def due(self) -> int:
        """Tokens that its next step computes, if there is room."""
        return max(self.prompt - self.computed, 1)

    @property
    def ended(self) -> bool:
        """All its tokens are out."""
        return self.computed >= self.prompt + self.outputs - 1


def replay(requests: list[Request], at_once: int, decode: int, late: int) -> None:
    """Closed loop; one that ends is followed, `late` steps later, by the next. The first step has one alone."""
    coming = [(0 if i == 0 else 1, request) for i, request in enumerate(requests[:at_once])]
    rest, running, waiting = iter(requests[at_once:]), list[Request](), list[Request]()
    step = 0
    while coming or running or waiting:
        waiting += [request for when, request in coming if when <= step]
        coming = [(when, request) for when, request in coming if when > step]
        batch = list(scheduled(running, waiting))
        mark(batch, decode)
        for request, tokens in batch:
            request.computed += tokens
        ended = [request for request in running if request.ended]
        running[:] = [request for request in running if not request.ended]
        coming += [(step + 1 + late, request) for _, request in zip(ended, rest, strict=False)]
        step += 1


def scheduled(running: list[Request], waiting: list[Request]) -> Iterator[tuple[Request, int]]:
    """One step's requests and tokens."""
    room = BUDGET
    for request in running:
        if tokens := min(request.due, room):
            room -= tokens
            yield request, tokens
    while waiting and room and len(running) < MOST:
        request = waiting.pop(0)
        running.append(request)
        tokens = min(request.due, room)
        room -= tokens
        yield request, tokens


def mark(batch: list[tuple[Request, int]], decode: int) -> None:
    """Who loses context in this step."""
    prefills = [(request, tokens) for request, tokens in sorted(batch, key=lambda b: b[1]) if tokens > decode]
    with_context = sum(request.computed > 0 for request, _ in prefills)
    merged = sum(tokens for _, tokens in prefills[:with_context])
    begin = 0
    for request, tokens in prefills:
        begin += tokens
        if begin > merged:
            request.lost = max(request.lost, request.computed)


def asked(times: int = 2) -> list[Request]:
    """The questions of the check: 32 prefixes, those lengths so many times, others from 16 to 256."""
    number = PREFIXES - times * len(EXACT)
    between = [round(16 * (256 / 16) ** (i / (number - 1))) for i in range(number)]
    prompts = [Request(f"prompt {i}", n, 32) for i, n in enumerate(GREEDY)]
    return prompts + [Request(f"{i} ({n:,})", n, 1) for i, n in enumerate([*EXACT * times, *between])]


def main() -> None:
    """Print the prefixes of the check that lose context, and how many requests of the published closed loops do."""
    for backend, decode in DECODE.items():
        for late in (1, 2, 3):
            check = asked()
            replay(check, 16, decode, late)
            lost = ", ".join(f"{r.name} loses {r.lost:,}" for r in check if r.lost) or "none"
            print(f"{backend}, the next question {late} steps late: {lost}")
    for (backend, decode), (prompt, at_once, rounds), late in itertools.product(DECODE.items(), LOADS, (0, 2)):
        load = [Request(str(i), prompt, 128) for i in range(rounds * at_once)]
        replay(load, at_once, decode, late)
        lost = sum(r.lost > 0 for r in load)
        print(f"{backend}, {prompt:,} in, {at_once} in flight, {late} steps late: {lost} of {len(load)} requests")


if __name__ == "__main__":
    main()
