"""In which order the rows of several domains come: a function of the seed, the epoch and the batch's number alone.

sentence-transformers' own samplers make the batches of each domain; here is decided whose turn it is. Because nothing else
enters, a resumed run goes on with the row where the killed one stopped.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from sentence_transformers.base.sampler import DefaultBatchSampler, MultiDatasetDefaultBatchSampler
from torch.utils.data import ConcatDataset


class DomainBatchSampler(MultiDatasetDefaultBatchSampler):
    """Batches from several datasets, in proportion to their sizes, by temperature, or in the mix of a curriculum's phase.

    In proportion (temperature 1, no mix) an epoch has every row once. Otherwise domains are drawn by weight; one that is
    used up starts again in a new order, and an epoch keeps its length.

    Args:
        dataset: The domains, concatenated.
        batch_samplers: One for each domain, from sentence-transformers.
        generator: The one that `batch_samplers` draw from.
        seed: Seed of everything.
        domains: Names, in the order of `batch_samplers`.
        temperature: T of the weights `n ** (1 / T)` for a domain of n rows; 1 is in proportion, infinity is uniform.
        one_domain_batches: Whether a batch holds one domain, or rows of all.
        steps_done: Tells the optimizer steps done when an epoch begins.
        batches_per_step: Batches in an optimizer step over all processes: processes times accumulation steps.
        processes: Processes that share the batches.
        mix_at: Optimizer step -> domain -> weight, or None where the weights above hold.

    Raises:
        ValueError: A temperature under 1, or a mix that names a domain which is not there.
    """

    def __init__(
        self,
        dataset: ConcatDataset,
        batch_samplers: list[DefaultBatchSampler],
        generator: torch.Generator,
        seed: int,
        *,
        domains: Sequence[str],
        temperature: float,
        one_domain_batches: bool,
        steps_done: Callable[[], int],
        batches_per_step: int,
        processes: int,
        mix_at: Callable[[int], Mapping[str, float] | None] | None,
    ):
        super().__init__(dataset, batch_samplers=list(batch_samplers), generator=generator, seed=seed)
        if not temperature >= 1:
            raise ValueError(f"temperature={temperature} is not possible; allowed: 1 (in proportion) or more.")
        self.domains = list(domains)
        self.samplers = batch_samplers
        self.shared_generator = generator
        self.sizes = np.diff([0, *dataset.cumulative_sizes])
        self.temperature = temperature
        self.one_domain_batches = one_domain_batches
        self.steps_done = steps_done
        self.batches_per_step = batches_per_step
        self.processes = processes
        self.mix_at = mix_at

    def __len__(self) -> int:
        if self.one_domain_batches:
            return sum(len(sampler) for sampler in self.batch_samplers)
        rows = int(self.sizes.sum())
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        # The epoch comes from the steps done: not every wrapper of a loader passes `set_epoch` on to its sampler
        per_process = len(self) // self.processes if self.drop_last else -(-len(self) // self.processes)
        steps_per_epoch = max(1, -(-per_process * self.processes // self.batches_per_step))
        epoch = self.steps_done() // steps_per_epoch
        first_step = epoch * steps_per_epoch
        if self.one_domain_batches:
            streams = [self._batches(domain, epoch) for domain in range(len(self.domains))]
            for domain in self._turns(epoch, first_step, [len(sampler) for sampler in self.batch_samplers], 1):
                yield next(streams[domain])
            return
        row_streams = [self._rows(domain, epoch) for domain in range(len(self.domains))]
        batch: list[int] = []
        for domain in self._turns(epoch, first_step, self.sizes.tolist(), self.batch_size):
            batch.append(next(row_streams[domain]))
            if len(batch) == self.batch_size:
                yield batch
                batch = []
        if batch and not self.drop_last:
            yield batch

    def _turns(self, epoch: int, first_step: int, shares: Sequence[int], draws_per_batch: int) -> Iterator[int]:
        """Whose turn it is, for every draw of an epoch; `shares` are the draws of each domain in proportion."""
        random = np.random.default_rng([self.seed, epoch])
        in_proportion = random.permutation(np.repeat(np.arange(len(shares)), shares))
        positions = random.random(len(in_proportion))
        own_weights = self.sizes ** (1 / self.temperature)
        for draw, (turn, position) in enumerate(zip(in_proportion, positions, strict=True)):
            step = first_step + draw // draws_per_batch // self.batches_per_step
            mix = self.mix_at(step) if self.mix_at else None
            if mix is None and self.temperature == 1:
                yield int(turn)
                continue
            weights = own_weights if mix is None else self._mixed(mix)
            cumulated = np.cumsum(weights / weights.sum())
            yield int(np.searchsorted(cumulated / cumulated[-1], position, side="right"))

    def _mixed(self, mix: Mapping[str, float]) -> np.ndarray:
        unknown = sorted(set(mix) - set(self.domains))
        if unknown:
            raise ValueError(f"mix names the domain {unknown[0]!r}; allowed: {self.domains}.")
        return np.array([mix.get(domain, 0.0) for domain in self.domains], dtype=float)

    def _rows(self, domain: int, epoch: int) -> Iterator[int]:
        """Rows of one domain without end, in a new order each time it is used up."""
        offset, passes = int(self.sizes[:domain].sum()), 0
        while True:
            order = np.random.default_rng([self.seed, epoch, domain, passes]).permutation(self.sizes[domain])
            yield from (offset + int(row) for row in order)
            passes += 1

    def _batches(self, domain: int, epoch: int) -> Iterator[list[int]]:
        """Batches of one domain without end, in a new order each time it is used up."""
        sampler, offset, passes = self.samplers[domain], int(self.sizes[:domain].sum()), 0
        while True:
            stream_seed = int(np.random.SeedSequence([self.seed, epoch, domain, passes]).generate_state(1)[0])
            sampler.set_epoch(stream_seed)  # samplers that reseed take this, the others what the generator holds
            self.shared_generator.manual_seed(stream_seed)
            for batch in sampler:
                yield [offset + row for row in batch]
            passes += 1
