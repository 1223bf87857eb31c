"""How a batch comes to the model: one after the other, or with the next batch's ids already on their way.

Both hand out batches and run the forward pass; what a step does with the loss is the Trainer's. So both give the same
losses.
"""

from typing import Any, Iterator, Optional, Union

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from fuxi_torchrec.config import TrainerConfig
from fuxi_torchrec.data.batch import SequenceBatch
from fuxi_torchrec.sharding.model_parallel import is_sharded


class BasePipeline:
    """A pipeline that works on one batch at a time: it is taken, moved to the device and computed."""

    def __init__(self, model: nn.Module, device: torch.device):
        self.model, self.device = model, device

    def take(self, batches: Iterator[SequenceBatch]) -> Optional[SequenceBatch]:
        """Returns the next batch, on the device; None at the end."""
        batch = next(batches, None)
        return None if batch is None else batch.to(self.device, non_blocking=True)

    def forward(self, batch: SequenceBatch) -> Tensor:
        """Computes the summed loss of the batch that was just taken, a float32 scalar."""
        return self.model(batch)

    def release(self) -> None:
        """Gives the model back as it was: before it is evaluated."""

    def drop(self) -> None:
        """Forgets what was taken ahead: `batches` has ended, or another iterator follows."""


class SparseDistPipeline(TrainPipelineSparseDist):
    """TorchRec's TrainPipelineSparseDist with its step cut in two, since the loss must be summed over all ranks before
    backward. While a batch computes, the ids of the next one go to the ranks that hold their rows (a replicated table has
    no such exchange), and the one after that is copied to the device."""

    def __init__(self, model: nn.Module, device: torch.device):
        # Optimizer and backward are the Trainer's.
        super().__init__(model, None, device, execute_all_batches=True)

    def take(self, batches: Iterator[SequenceBatch]) -> Optional[SequenceBatch]:
        """Returns the next batch, on the device; None at the end. Reads up to two batches ahead."""
        if not self._model_attached:
            self.attach(self._model, sparse_dist=False)  # the exchange of the waiting batch has begun
        if self._computed:
            self.dequeue_batch()
            self._computed = False
        self.fill_pipeline(batches)
        if not self.batches:
            return None
        self._set_module_context(self.contexts[0])
        self._wait_for_batch()
        return self.batches[0]

    def forward(self, batch: SequenceBatch) -> Tensor:
        """Computes the summed loss of the batch that was just taken, a float32 scalar."""
        if len(self.batches) >= 2:
            self.start_sparse_data_dist(self.batches[1], self.contexts[1])
        self.enqueue_batch(self._dataloader_iter)
        loss = self._model(batch)
        if len(self.batches) >= 2:
            self.wait_sparse_data_dist(self.contexts[1])
        self._computed = True
        return loss

    def release(self) -> None:
        """Gives the model back as it was; batches on their way stay."""
        if self._computed:
            self.dequeue_batch()
            self._computed = False
        self.detach()

    def drop(self) -> None:
        """Forgets what was taken ahead, once its exchange is over on all ranks."""
        for context in self.contexts:
            for request in context.input_dist_tensors_requests.values():
                request.wait()
        self.batches.clear()
        self.contexts.clear()
        self._computed = False

    def _pipeline_model(self, batch: Optional[SequenceBatch], context: Any, *rest: Any, **more: Any) -> None:
        if is_sharded(self._model):
            super()._pipeline_model(batch, context, *rest, **more)
        else:  # no lookup to take apart, which torchrec would search for by tracing the encoder
            self.start_sparse_data_dist(batch, context)

    _computed = False


Pipeline = Union[BasePipeline, SparseDistPipeline]


def build_pipeline(trainer: TrainerConfig, model: DistributedModelParallel, device: torch.device) -> Pipeline:
    """Builds the pipeline that trainer.train_pipeline names, or that suits the device."""
    kind = trainer.train_pipeline or ("sparse_dist" if device.type == "cuda" else "base")
    return SparseDistPipeline(model, device) if kind == "sparse_dist" else BasePipeline(model, device)
