"""The loop: collect a batch, accumulate its loss over micro-batches, step, log, evaluate, save.

It names no algorithm. Online algorithms make their batch from prompts, rollout, rewards and advantages; offline
ones read it from a data set; the rest of the line is this file.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from rlft.algos.base import Algorithm, Run
from rlft.core.batch import Batch, Denominators
from rlft.core.errors import ConfigError, NonFiniteError
from rlft.core.metrics import JsonlFile, Metrics, traced
from rlft.core.rng import generator
from rlft.models.scorer import Scorer
from rlft.tracking import efficiency
from rlft.tracking.progress import Progress
from rlft.tracking.trackers import Tracker
from rlft.trainer.checkpoint import Checkpoints
from rlft.trainer.schedule import learning_rate_of
from rlft.trainer.train_state import TrainState

if TYPE_CHECKING:
    from accelerate import Accelerator  # takes a while to import

MAX_NON_FINITE_STEPS = 3  # in a row, before the run stops
NUM_SHOWN_SAMPLES = 5  # on the screen; samples.jsonl holds them all


class Trainer:
    """Trains a run's policy by `algorithm` until the first limit, and can stop and go on at any step."""

    def __init__(
        self,
        run: Run,
        algorithm: Algorithm,
        *,
        accelerator: Accelerator,
        run_dir: Path,
        tracker: Tracker,
        progress: Progress,
    ) -> None:
        settings, head, updates = run.settings, algorithm.head, algorithm.updates_per_batch
        if settings.steps % updates:
            raise ConfigError(
                f"steps={settings.steps} must be a multiple of the {updates} optimizer steps on a batch (algo.epochs x "
                f"algo.minibatches), as a run ends between batches: steps={-(-settings.steps // updates) * updates}"
            )
        if not algorithm.is_evaluated:
            settings.check_without_evaluation()
        self.policy, self.settings, self.clock = run.policy, settings, run.clock
        self.algorithm, self.accelerator, self.tracker, self.progress = algorithm, accelerator, tracker, progress
        optimizer = run.policy.configure_optimizers(
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            betas=settings.betas,
            head=head,
            head_scale=1.0 if head is None else head.lr_scale,
        )
        # Moved here and not by accelerate, which would import torch's distributed tensors for it: that takes a second.
        scorer = Scorer(run.policy, head).to(accelerator.device)
        self.scorer, self.optimizer = accelerator.prepare(scorer, optimizer, device_placement=[False, False])
        self.run_dir = run_dir
        self.checkpoints = Checkpoints(run_dir / "checkpoints", keep=settings.keep)
        self.metrics_file, self.samples_file = (JsonlFile(run_dir / f"{name}.jsonl") for name in ("metrics", "samples"))
        self.state = TrainState()
        self.batch: Batch | None = None  # of the step before
        self.updated: dict[str, float] = {}  # the metrics of the last update on it
        self.last_row: dict[str, float] = {}

    def resume(self) -> None:
        """Continue from the newest checkpoint; the rows that were logged after it are dropped and computed again."""
        steps = self.checkpoints.steps()
        step = steps[-1] if steps else 0
        if steps:
            saved = self.checkpoints.load(step, self.policy, self._inner_optimizer, head=self.algorithm.head)
            self.state = TrainState(**saved["trainer"])
            self.algorithm.load_state_dict(saved["algorithm"])
        self.samples_file.truncate_after(step if steps else -1)
        self.last_row = self.metrics_file.truncate_after(step if steps else -1)

    def train(self, should_stop: Callable[[], bool] = lambda: False) -> str:
        """Run to the first limit and return why it ended: steps, max_minutes, max_tokens, early_stopping or signal."""
        started = time.perf_counter() - self.state.seconds
        if self.algorithm.is_evaluated and not self.state.before:
            self.state.before = self._evaluate("before training")
            self._log({"step": 0, **self.state.before, **self.clock.take()})
            if self.settings.patience is not None:  # early stopping may come back to the untouched policy
                self.save()
        with traced(self.run_dir / "trace.json" if self.settings.profile else None) as after_step:
            return self._train(started, should_stop, after_step)

    def _train(self, started: float, should_stop: Callable[[], bool], after_step: Callable[[], None]) -> str:
        while (reason := self._ended()) is None:
            row = self.step(self.state.step)
            after_step()
            self.state.seconds = time.perf_counter() - started
            is_due = self._ended() is not None or self._is_due(self.settings.eval_every)
            if self.algorithm.is_evaluated and is_due:
                row |= self._evaluate(f"step {self.state.step}") | self.clock.take()
            self._log(row | {"wall_time": self.state.seconds})
            # The row comes before its checkpoint: a resumed run computes again what follows the checkpoint.
            is_whole = self.state.step % self.algorithm.updates_per_batch == 0
            stop = is_whole and should_stop()
            is_last = self._ended() is not None  # an evaluation may have ended it
            if is_whole and (is_last or stop or self._is_best_to_keep() or self._is_due(self.settings.save_every)):
                self.save()
            if stop and not is_last:
                return "signal"
        if reason == "early_stopping":
            assert self.state.best_step is not None
            self.checkpoints.load(self.state.best_step, self.policy, head=self.algorithm.head)
            self._evaluate(f"the best policy, of step {self.state.best_step}", is_again=True)
        return reason

    def step(self, step: int) -> dict[str, float]:
        """Take one optimizer step: batch, loss over micro-batches, clip, step; returns its metrics."""
        began = time.perf_counter()
        update = step % self.algorithm.updates_per_batch
        if self.batch is None or update == 0:
            self.batch, self.updated = self.algorithm.collect(step // self.algorithm.updates_per_batch), {}
            self.state.num_tokens += int(self._denominators(self.batch).num_tokens)
            for sample in self.batch.samples:
                self.samples_file.write({"step": step + 1} | sample)
        metrics = self.batch.metrics.reduce(self.accelerator)
        batch = self.algorithm.minibatch(self.batch, update, before=self.updated)
        if batch is not None:
            self.updated = self._optimize(batch, step, update)
            metrics |= self.updated
        self.state.step = step + 1
        num_tokens = self._denominators(batch or self.batch).num_tokens
        seconds = time.perf_counter() - began
        parts = self.clock.take()
        return {
            "step": self.state.step,
            **metrics,
            **({"passed_over": float(batch is None)} if self.algorithm.updates_per_batch > 1 else {}),
            "num_tokens": self.state.num_tokens,
            "non_finite_steps": self.state.non_finite,
            "step_time": seconds,
            "tokens_per_second": num_tokens / seconds,
            **parts,
            "time/other": seconds - sum(parts.values()),
            "memory/peak_gib": efficiency.peak_memory_gib(self.accelerator.device),
        }

    def _optimize(self, batch: Batch, step: int, update: int) -> dict[str, float]:
        """Accumulate the gradient of a batch over its micro-batches, and step."""
        metrics, denominators = Metrics(), self._denominators(batch)
        with self.clock("update"):
            loss, micro_batches = self._accumulate(batch, denominators, metrics, step, update)
        rate = learning_rate_of(self.settings, step)
        with self.clock("optimizer"):
            grad_norm = self._update(batch, float(loss), rate)
        total_loss = loss.to(self.accelerator.device)
        return {
            "loss": float(self.accelerator.reduce(total_loss, reduction="sum")),
            **metrics.reduce(self.accelerator),
            "grad_norm": grad_norm,
            "learning_rate": rate,
            **efficiency.of_update(
                self.policy,
                batch,
                micro_batches,
                device=self.accelerator.device,
                seconds=self.clock.seconds["update"] + self.clock.seconds["optimizer"],
                dtype=torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32,
            ),
        }

    def _accumulate(
        self, batch: Batch, denominators: Denominators, metrics: Metrics, step: int, update: int
    ) -> tuple[Tensor, list[Batch]]:
        """Run forward and backward over the batch's micro-batches; return this rank's loss and what was run."""
        needed, limits = self.algorithm.needed(batch), self.settings.limits
        micro_batches = list(needed.micro_batches(**limits))
        if len(micro_batches) > 1:
            micro_batches = list(needed.by_length().micro_batches(**limits))
        loss = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        self.scorer.train()
        for i, micro in enumerate(micro_batches):
            is_last = i == len(micro_batches) - 1
            # Dropout, where a model has it, draws from torch's generator, which each micro-batch seeds anew.
            key = (step, i, self.accelerator.process_index)
            torch.manual_seed(int(generator(self.settings.seed, "dropout", *key).integers(2**62)))
            with nullcontext() if is_last else self.accelerator.no_sync(self.scorer):
                share = self.algorithm.loss(self.scorer, micro, denominators, metrics, update=update)
                # Ranks average their gradients, and a loss over global counts needs the sum.
                self.accelerator.backward(share * self.accelerator.num_processes)
            loss += share.detach()
        return loss, micro_batches

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        if self.accelerator.is_main_process and self.state.step not in self.checkpoints.steps():
            state = {"trainer": vars(self.state).copy(), "algorithm": self.algorithm.state_dict()}
            self.checkpoints.save(
                self.state.step,
                self.policy,
                self._inner_optimizer,
                state,
                best_step=self.state.best_step,
                head=self.algorithm.head,
            )
        self.accelerator.wait_for_everyone()

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer  # accelerate wraps the one that `configure_optimizers` made

    def _denominators(self, batch: Batch) -> Denominators:
        counts = torch.tensor([batch.num_tokens, batch.num_rows], device=self.accelerator.device, dtype=torch.float64)
        tokens, rows = self.accelerator.reduce(counts, reduction="sum").tolist()
        return Denominators(num_tokens=tokens, num_sequences=rows)

    def _update(self, batch: Batch, loss: float, rate: float) -> float:
        """Clip and step; a loss or gradient that is not finite skips the step, and three in a row stop the run."""
        grad_norm = float(self._clip()(self.scorer.parameters(), self.settings.max_grad_norm))
        if math.isfinite(loss) and math.isfinite(grad_norm):
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            self.optimizer.step()
            self.state.non_finite_in_row = 0
        else:
            self._skip(batch, loss, grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def _clip(self) -> Callable[..., Tensor]:
        """Return the function that clips gradients; accelerate's knows sharded ones, and takes a second to import."""
        is_alone = self.accelerator.num_processes == 1
        return torch.nn.utils.clip_grad_norm_ if is_alone else self.accelerator.clip_grad_norm_

    def _skip(self, batch: Batch, loss: float, grad_norm: float) -> None:
        self.state.non_finite += 1
        self.state.non_finite_in_row += 1
        path = self.run_dir / "non_finite_batch.safetensors"
        tensors = vars(batch.rows) | batch.values
        save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, path)
        step = self.state.step + 1
        self.progress.message(f"step {step} skipped: loss {loss}, gradient norm {grad_norm}; batch saved to {path}")
        if self.state.non_finite_in_row >= MAX_NON_FINITE_STEPS:
            raise NonFiniteError(
                f"{MAX_NON_FINITE_STEPS} steps in a row (the last is {step}) had a loss or gradient that is not "
                f"finite; the last batch is in {path}. A lower learning_rate or max_grad_norm may help"
            )

    def _evaluate(self, title: str, *, is_again: bool = False) -> dict[str, float]:
        """Evaluate the policy as it is, note whether it is the best so far, and show samples.

        `is_again`: it is the policy of an earlier step, whose samples are in the files already.
        """
        self.scorer.eval()
        with self.clock("eval"):
            evaluation = self.algorithm.evaluate()
        for metric, number in evaluation.metrics.items():
            if not math.isfinite(number):
                raise NonFiniteError(f"{metric} is {number} in the evaluation at step {self.state.step}")
        name, mode = self.algorithm.objective
        self.state.evaluated(evaluation.metrics, name=name, mode=mode)
        if evaluation.samples:
            self.progress.samples(f"Held-out samples, {title}", evaluation.samples[:NUM_SHOWN_SAMPLES])
        if evaluation.samples and not is_again:
            self.tracker.samples(self.state.step, evaluation.samples)
            for sample in evaluation.samples:
                self.samples_file.write({"step": self.state.step, "split": "eval"} | sample)
        return evaluation.metrics

    def _log(self, row: dict[str, float]) -> None:
        self.last_row = row
        self.metrics_file.write(row)
        self.progress.step(self.state.step, row)  # which has its own log_every
        if self.state.step % self.settings.log_every == 0 or self.algorithm.objective[0] in row:
            self.tracker.log(self.state.step, row)

    def _is_best_to_keep(self) -> bool:
        """Whether this step's policy is the best so far, and early stopping or the checkpoints want it."""
        is_wanted = self.settings.patience is not None or self.settings.save_every > 0
        return is_wanted and self.state.best_step == self.state.step

    def _is_due(self, every: int) -> bool:
        """Whether the batch that ends here reached a multiple of `every` steps; false within a batch."""
        step, updates = self.state.step, self.algorithm.updates_per_batch
        return every > 0 and step % updates == 0 and step // every > (step - updates) // every

    def _ended(self) -> str | None:
        """Return why the run is over, or None; a run ends between batches only."""
        return None if self.state.step % self.algorithm.updates_per_batch else self.state.ended(self.settings)
