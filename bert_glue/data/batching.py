"""Chooses the samples of each step and rank, and collates them into batches.

The order depends only on the seed and the epoch. A resumed run therefore continues in the same order, and packed and
padded runs on one rank or eight see the same samples in the same step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from bert_glue.data.packing import COARSE_COUNTS, COUNTS, PackedLayout, bucket, width_bucket
from bert_glue.data.tokenization import TokenTable

# Megabatches of group_by_length, in optimizer steps; as in transformers' LengthGroupedSampler.
_MEGABATCH = 50


@dataclass(frozen=True)
class TokenSplit:
    """A tokenized split with its labels.

    Args:
        name: of the split.
        table: token ids.
        labels: `[rows]` int64 or float32. None if unlabelled.
    """

    name: str
    table: TokenTable
    labels: np.ndarray | None

    def __len__(self) -> int:
        """Rows."""
        return len(self.table)

    @property
    def sequences(self) -> TokenSplit:
        """The same, unlabelled, with a row for each sequence."""
        return TokenSplit(self.name, self.table.sequences, None)


@dataclass(frozen=True)
class Batch:
    """The input of one forward pass.

    Args:
        inputs: keyword arguments of the module.
        labels: `[samples]` on the module's device. None if unlabelled.
        lengths: tokens of each sequence, on the host.
        computed_tokens: tokens the model runs, padding and filler included.
        step_weight: 0-d on the device, the sum of the class weights of all rows of the optimizer step, on all ranks;
            None without `--class_weights`.
        windows: the number of sequences of each sample, on the host. None if each sample is one sequence.
    """

    inputs: dict
    labels: torch.Tensor | None
    lengths: tuple[int, ...]
    computed_tokens: int
    step_weight: torch.Tensor | None = None
    windows: tuple[int, ...] | None = None

    @property
    def samples(self) -> int:
        """Number of rows in the batch."""
        return len(self.lengths if self.windows is None else self.windows)

    @property
    def real_tokens(self) -> int:
        """Number of tokens of those rows, without padding."""
        return sum(self.lengths)

    def row_means(self, logits: torch.Tensor) -> torch.Tensor:
        """`[sequences, labels]` -> `[samples, labels]`: the mean over each row's windows, in fp32 where there are some.

        One small sum a row, in the order of its windows: index_add_ would add in any order on a device, so that a
        resumed run was another one.
        """
        if self.windows is None:
            return logits
        return torch.stack([part.mean(0) for part in logits.float().split(self.windows)])


@dataclass(frozen=True)
class Collator:
    """Makes a batch on a device of rows of a split.

    Args:
        padding: packed, longest or max_length.
        max_length: tokens to which a max_length batch is padded.
        pad_id: token id of padding.
        gives_types: the tokenizer gives token types (padded runs only).
        pads_left: padding goes before a sequence, not behind it.
        depends_on_padding: padding changes the model's answers, so that it is scored on batches without any.
        is_rounded: token counts of packed batches, and widths of padded ones, are rounded up to a bucket. A packed
            batch then always ends with filler, so that there is one sequence more than there are samples.
        is_coarse: fewer buckets, for recorded steps and for bf16 on a CPU.
        is_pinned: a batch goes to the device in one copy from pinned memory.
        device: where the tensors go.
        renumber: `[vocabulary]` int32, token id -> row of a narrowed embedding table, or None.
        shapes: token counts of the batches so far.
    """

    padding: str
    max_length: int
    pad_id: int
    gives_types: bool
    device: torch.device
    pads_left: bool = False
    depends_on_padding: bool = False
    is_rounded: bool = False
    is_coarse: bool = False
    is_pinned: bool = False
    row_of_token: np.ndarray | None = None
    shapes: set[int] = field(default_factory=set)

    @property
    def counts(self) -> int:
        """Buckets of token counts between one power of two and the next."""
        return COARSE_COUNTS if self.is_coarse else COUNTS

    def __call__(self, split: TokenSplit, rows: np.ndarray) -> Batch:
        """The batch of `rows` (`[samples]` int64), in that order."""
        table, sequences = split.table, rows
        windows = None
        if table.first is not None:
            counts = table.first[rows + 1] - table.first[rows]
            sequences = np.repeat(table.first[rows + 1] - np.cumsum(counts), counts) + np.arange(counts.sum())
            windows = tuple(counts.tolist()) if (counts > 1).any() else None
        begins, ends = table.offsets[sequences], table.offsets[sequences + 1]
        tokens = [slice(*border) for border in zip(begins.tolist(), ends.tolist(), strict=True)]
        build = self._packed if self.padding == "packed" else self._padded
        arrays, layout = build([table.ids[one] for one in tokens], [table.types[one] for one in tokens])
        computed = arrays["input_ids"].size
        self.shapes.add(computed)
        if split.labels is not None:
            arrays["labels"] = split.labels[rows]
        inputs = self._on_device(arrays, layout)
        labels = inputs.pop("labels", None)
        return Batch(inputs, labels, tuple((ends - begins).tolist()), computed, windows=windows)

    def _on_device(self, arrays: dict[str, np.ndarray], layout: PackedLayout | None) -> dict:
        """Arrays as tensors on the device, and the layout."""
        if not self.is_pinned:
            tensors = {name: self.move(torch.from_numpy(array)) for name, array in arrays.items()}
            return tensors if layout is None else {**tensors, "layout": layout}
        if layout is None:
            return _in_one_copy(arrays, self.device)
        tensors = _in_one_copy({**arrays, "cu_seqlens": np.array(layout.cu_seq_lens, np.int32)}, self.device)
        layout.keep_cu_seqlens(tensors.pop("cu_seqlens"))
        return {**tensors, "layout": layout}

    def _packed(
        self, ids: list[np.ndarray], types: list[np.ndarray]
    ) -> tuple[dict[str, np.ndarray], PackedLayout | None]:
        lengths = tuple(len(i) for i in ids)
        tail = bucket(sum(lengths) + 1, self.counts) - sum(lengths) if self.is_rounded else 0
        layout = PackedLayout(lengths, tail)
        filler = np.full(layout.tail, self.pad_id, np.int32)
        flat = np.concatenate([*ids, filler])
        if self.row_of_token is not None:
            flat = self.row_of_token[flat]
        arrays = {
            "input_ids": flat.astype(np.int64),
            "token_type_ids": np.concatenate([*types, np.zeros(layout.tail, np.int8)]).astype(np.int64),
            "position_ids": layout.positions,
        }
        return {name: array[None] for name, array in arrays.items()}, layout

    def _padded(
        self, ids: list[np.ndarray], types: list[np.ndarray]
    ) -> tuple[dict[str, np.ndarray], PackedLayout | None]:
        lengths = np.array([len(i) for i in ids])
        width = self.max_length if self.padding == "max_length" else int(lengths.max())
        if self.is_rounded:
            width = min(width_bucket(width), self.max_length)
        columns = np.arange(width)[None]
        mask = columns >= width - lengths[:, None] if self.pads_left else columns < lengths[:, None]
        block = np.full((len(ids), width), self.pad_id, np.int64)
        block[mask] = np.concatenate(ids)
        arrays = {"input_ids": block, "attention_mask": mask.astype(np.int64)}
        if self.gives_types:
            arrays["token_type_ids"] = np.zeros_like(block)
            arrays["token_type_ids"][mask] = np.concatenate(types)
        return arrays, None

    def move(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, copied to the device of the batch."""
        return tensor.to(self.device, non_blocking=True)


_ALIGNED = 16  # bytes; every array begins at a multiple


def _pinned_block(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _in_one_copy(arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """Arrays as tensors on a device, as parts of one block that was copied there from pinned memory.

    Five copies from pageable memory are five stagings by the driver; this is one transfer, for which nobody waits.
    """
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    begins, size = [], 0
    for tensor in tensors.values():
        begins.append(size)
        size += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
    host = _pinned_block(size)
    for begin, tensor in zip(begins, tensors.values(), strict=True):
        host[begin : begin + tensor.nbytes].copy_(tensor.view(-1).view(torch.uint8))
    # torch keeps the block from being used again before the copy is over.
    block = host.to(device, non_blocking=True)
    return {
        name: block[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for begin, (name, tensor) in zip(begins, tensors.items(), strict=True)
    }


@dataclass(frozen=True)
class TrainingSampler:
    """The samples of every optimizer step, equal on all ranks.

    Args:
        rows: samples of the split.
        micro_batch: samples of one forward pass on all ranks together.
        accumulation: forward passes per optimizer step.
        seed: of the order.
        drop_last: leave out an epoch's last, smaller forward pass.
        whole_steps: `drop_last` leaves out the last, smaller optimizer step, so that the samples of an epoch do
            not depend on how a step is dealt out to passes and ranks.
        lengths: `[rows]`, given to keep samples of similar length together; None for plain shuffling.
    """

    rows: int
    micro_batch: int
    accumulation: int
    seed: int
    drop_last: bool
    lengths: np.ndarray | None = field(default=None, compare=False)
    whole_steps: bool = False

    @property
    def step_size(self) -> int:
        """Number of samples in a full optimizer step."""
        return self.micro_batch * self.accumulation

    @property
    def unit(self) -> int:
        """The samples of an epoch are a multiple of this number."""
        if not self.drop_last:
            return 1
        return self.step_size if self.whole_steps else self.micro_batch

    @property
    def micro_batches_per_epoch(self) -> int:
        """Number of forward passes in one epoch."""
        return math.ceil(self.rows // self.unit * self.unit / self.micro_batch)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; the last may have fewer forward passes."""
        return math.ceil(self.micro_batches_per_epoch / self.accumulation)

    def permutation(self, epoch: int) -> np.ndarray:
        """The order of all samples in `epoch` (from 0), `[rows]` int64."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        if self.lengths is None:
            return order
        size = _MEGABATCH * self.step_size
        parts = [order[i : i + size] for i in range(0, self.rows, size)]
        return np.concatenate([part[np.argsort(-self.lengths[part], kind="stable")] for part in parts])

    def step(self, permutation: np.ndarray, step_in_epoch: int) -> list[np.ndarray]:
        """The rows of each forward pass in one optimizer step, of all ranks together."""
        first = step_in_epoch * self.accumulation
        last = min(first + self.accumulation, self.micro_batches_per_epoch)
        size = self.micro_batch
        return [permutation[i * size : (i + 1) * size] for i in range(first, last)]


def rank_share(rows: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """This rank's contiguous part of a list of rows; parts differ by one sample at most."""
    return np.array_split(rows, world_size)[rank]


def evaluation_batches(
    lengths: np.ndarray, batch_size: int, rank: int, world_size: int, is_even: bool = False
) -> list[np.ndarray]:
    """Each sample exactly once over all ranks, longest first, so that batches are of similar length.

    Args:
        is_even: no two lengths in one batch.
    """
    order = np.argsort(-lengths, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1) if is_even else [order]
    batches = [group[at : at + batch_size] for group in groups for at in range(0, len(group), batch_size)]
    return batches[rank::world_size]


def prefetch(batches: Iterable, depth: int = 2) -> Iterator:
    """Yield the same items, which a thread prepares up to `depth` items in advance.

    This helps on devices that compute while the host collates; on a CPU both would need the same cores. An error in the
    thread is raised here.
    """
    import queue
    import threading

    ready: queue.Queue = queue.Queue(depth)
    stop = threading.Event()
    end = object()

    def put(item: object, error: BaseException | None = None) -> bool:
        while not stop.is_set():
            try:
                ready.put((item, error), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def fill() -> None:
        try:
            if all(put(item) for item in batches):
                put(end)
        except BaseException as error:
            put(end, error)

    thread = threading.Thread(target=fill, daemon=True, name="batches")
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        thread.join(timeout=5)
