"""How evenly a checkpoint's routers spread random tokens over the experts.

Letters: T tokens, B sequences, P positions, E experts, K experts chosen for a token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stackrace.backends import checkpoint as checkpoints
from stackrace.backends.mla import cache, weights
from stackrace.backends.mla.config import parse
from stackrace.backends.mla.model import Experts, Model
from stackrace.backends.mla.runner import Runner
from stackrace.backends.mla.scheduler import Work
from stackrace.backends.mla.sequence import Sampling, Sequence

BATCH = 16  # sequences that decode side by side
POSITIONS = 256  # of each; BATCH * POSITIONS tokens in all
_PAGES = BATCH * cache.num_pages_for(POSITIONS)


class Balance(NamedTuple):
    """Over all layers with experts."""

    num_layers: int
    num_experts: int
    num_chosen: int
    mean_touched: float  # distinct experts that a batch of BATCH tokens needs in one layer
    fewest_touched: float  # the same in the layer where it is lowest
    largest_share: float  # of all tokens, that the busiest expert of any layer was chosen for

    @property
    def even_touched(self) -> float:
        """What `mean_touched` would be, were every choice of experts equally likely."""
        return self.num_experts * (1 - (1 - self.even_share) ** BATCH)

    @property
    def even_share(self) -> float:
        """What every expert's share would then be."""
        return self.num_chosen / self.num_experts


def measure(checkpoint: checkpoints.Checkpoint, device: torch.device, dtype: torch.dtype, seed: int) -> Balance:
    """Run BATCH random prompts of POSITIONS tokens through the whole model, listening to its routers.

    The tokens at one position of all prompts are what a step decodes. The model must have experts.
    """
    config = parse(checkpoint.config)
    model = Model(config, "mla", POSITIONS, dtype, device)
    weights.load(checkpoint, model.destinations())
    heard = _listen(model)
    pages = cache.allocate(config, "mla", _PAGES, dtype, device)
    runner = Runner(model, pages, device)
    for work in _prompts(config.vocab_size, seed):
        runner.logits([work])
    chosen = [torch.stack(choices).cpu() for choices in heard.values()]
    assert config.mixture is not None
    return _summarise(chosen, config.mixture.num_experts)


def _listen(model: Model) -> dict[Experts, list[Tensor]]:
    """What each router chooses from now on, [P, K] a prompt."""
    heard: dict[Experts, list[Tensor]] = {}
    for module in model.modules():
        if isinstance(module, Experts):
            heard[module] = []
            module.register_forward_pre_hook(lambda m, args: heard[m].append(m.route(args[0]).expert_TK))
    return heard


def _prompts(vocab_size: int, seed: int) -> list[Work]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (BATCH, POSITIONS), generator=generator).tolist()
    each = cache.num_pages_for(POSITIONS)
    work = []
    for index, prompt in enumerate(tokens):
        sequence = Sequence(str(index), prompt, 1, Sampling(temperature=0, seed=0), frozenset())
        sequence.pages = list(range(index * each, (index + 1) * each))
        work.append(Work(sequence, POSITIONS))
    return work


def _summarise(chosen: list[Tensor], num_experts: int) -> Balance:
    """`chosen` holds [B, P, K] a layer."""
    touched, shares = [], []
    for expert_BPK in chosen:
        is_hit_PE = torch.zeros(expert_BPK.shape[1], num_experts, dtype=torch.bool)
        is_hit_PE.scatter_(1, expert_BPK.transpose(0, 1).flatten(1), value=True)
        touched.append(is_hit_PE.sum(1).double().mean().item())
        counts = torch.bincount(expert_BPK.flatten(), minlength=num_experts)
        shares.append(counts.max().item() / expert_BPK[..., 0].numel())
    num_chosen = chosen[0].shape[-1]
    mean = sum(touched) / len(touched)
    return Balance(len(chosen), num_experts, num_chosen, mean, min(touched), max(shares))
