"""Which sequences a step uses, as a pure function of the step (law 2), and which of them a rank computes (law 3).

Nothing here has state. The step is the position in the data, so checkpoints save no sampler, and
the world may change between any two steps. The order of an epoch is a keyed permutation, computed
index by index in constant memory.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

ROUNDS = (
    6  # of the Feistel network; four give a pseudo-random permutation (Luby and Rackoff, 1988), plus two as a margin
)


def sequence_count(tokens: int, block_size: int) -> int:
    """Number of non-overlapping sequences in `tokens` tokens. A sequence needs one token more, for its last target."""
    return max(0, (tokens - 1) // block_size)


@dataclass(frozen=True)
class Order:
    """Gives the sequence ids of the global batch of each step.

    Attributes:
        sequences: number of sequences in the corpus. An epoch uses each of them once.
        global_batch: sequences per step.
        seed: key of the permutations. Each epoch has its own permutation.
    """

    sequences: int
    global_batch: int
    seed: int

    def ids(self, step: int) -> Ids:
        """The sequence ids of `step`, counted from 0: int64 (global_batch,). They may span two epochs."""
        places = np.arange(step * self.global_batch, (step + 1) * self.global_batch, dtype=np.int64)
        epochs, indices = np.divmod(places, self.sequences)
        ids = np.empty_like(indices)
        for epoch in set(epochs.tolist()):  # np.unique imports 10 ms of numpy.ma, for which a whole world would wait
            inside = epochs == epoch
            ids[inside] = permute(indices[inside], self.sequences, f"{self.seed}/{epoch}")
        return ids


def sequence_hash(ids: Ids) -> str:
    """A hash of a step's ids in order: equal in two runs exactly when they used the same data."""
    return hashlib.blake2b(ids.astype("<i8").tobytes(), digest_size=8).hexdigest()


def permute(indices: Ids, size: int, key: str) -> Ids:
    """Images of `indices` under the permutation of range(size) that belongs to `key`.

    A balanced Feistel network permutes the smallest even number of bits that can hold `size`. An
    image outside the range is permuted again until it is inside (cycle walking, Black and Rogaway
    2002): less than four times on average.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    digest = hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest()
    keys = np.frombuffer(digest, dtype="<u8")

    def network(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> half, values & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        return (left << half) | right

    images = network(indices.astype(np.uint64))
    while (outside := images >= size).any():
        images[outside] = network(images[outside])
    return images.astype(np.int64)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014). uint64 arithmetic is meant to wrap."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def share(micro_batches: int, rank: int, size: int) -> range:
    """Indices of the micro-batches that `rank` of `size` ranks computes in a step.

    They are contiguous, and the sizes of two shares differ by at most one. With more ranks than
    micro-batches, some are empty.
    """
    return range(micro_batches * rank // size, micro_batches * (rank + 1) // size)


def micro_batch_seed(seed: int, step: int, micro_batch: int) -> int:
    """Seed of the random numbers (dropout) of one micro-batch, the same on any rank (law 1)."""
    digest = hashlib.blake2b(f"{seed}/{step}/{micro_batch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes seeds that fit an int64
