"""Train the example model on a CPU.

    python train.py --out RUN_FOLDER --steps 9000

First ``--restate-steps`` batches of restatements (the passages, then the same sentences in another order),
which teach the model to look up who a sentence is about. Then questions, on document sets that grow in five
levels; a level is left when the running mean of answer token accuracy passes ``--level-up``. Until the fourth
level a few batches are still restatements and the passages themselves are predicted too, with a small weight.

The learning rate follows the step count, never the clock. The run saves a checkpoint every ``--save-every``
steps and continues from it when the same command is given again (``--steps`` may be changed).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from batches import PREFIX, Batch, RowMaker, collate, question_batch, restatement_batch
from generator import FULL_TASK, KINDS, TaskShape, make_document_set
from network import Network, NetworkConfig
from optimizer import Optimizer
from tokenizer import SHIPPED, load_tokenizer
from torch import Tensor

LEVELS = (
    TaskShape(passages=(1, 2), sentences=(2, 3), speaker_probability=0.0),
    TaskShape(passages=(2, 4), sentences=(2, 4), speaker_probability=0.5),
    TaskShape(passages=(2, 5), sentences=(2, 4), speaker_probability=0.5),
    TaskShape(passages=(3, 5), sentences=(2, 4), speaker_probability=0.6),
    FULL_TASK,
)
PASSAGES_LEARNT_FROM_LEVEL = 3  # below it, restatements go on and the passages are predicted too
RESTATEMENT_SHARE = 0.08
PASSAGE_LOSS_WEIGHT = 0.2
QUESTIONS_PER_KIND = (4, 4, 4)  # at most, of a document set, in the order of generator.KINDS
MIN_STEPS_PER_LEVEL = 60
HELD_OUT_SEED = 777


@dataclass
class Progress:
    """Everything a resumed run needs besides weights, optimizer and random state."""

    step: int = 0
    tokens: int = 0
    level: int = 0
    level_started: int = 0
    accuracy: float = 0.0  # running mean over answer tokens
    seconds: float = 0.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the example model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the log")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--tokenizer", type=Path, default=SHIPPED)
    parser.add_argument("--init", type=Path, help="checkpoint whose weights a new run starts from")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--heads", type=int, default=5)
    parser.add_argument("--head-width", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--adam-rate", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument(
        "--anneal", type=float, default=0.6, help="part of the steps over which the rate falls to 0"
    )
    parser.add_argument("--batch-tokens", type=int, default=2560)
    parser.add_argument("--restate-steps", type=int, default=300)
    parser.add_argument("--start-level", type=int, default=0)
    parser.add_argument("--level-up", type=float, default=0.85)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def rate_factor(step: int, steps: int, warmup: int, anneal: float) -> float:
    """Linear warm-up, constant, then linear to 0 over the last part ``anneal`` of the steps."""
    return min(1.0, (step + 1) / warmup) * min(1.0, (steps - step) / (anneal * steps))


def answer_logits(model: Network, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits at the positions before a target, and the wanted tokens."""
    chosen = batch.is_target[:, 1:] > 0
    return hidden[:, :-1][chosen] @ model.embedding.T, batch.ids[:, 1:][chosen]


def passage_logits(model: Network, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits and wanted tokens within the passages."""
    chosen = batch.segments[:, 1:] == PREFIX
    return hidden[:, :-1][chosen] @ model.embedding.T, batch.ids[:, 1:][chosen]


@torch.no_grad()
def exact_match(
    model: Network, maker: RowMaker, num_sets: int, shape: TaskShape = FULL_TASK
) -> dict[str, float]:
    """Percentage of held-out questions whose every answer token, the last too, is the first choice."""
    rng = random.Random(HELD_OUT_SEED)
    right = dict.fromkeys(KINDS, 0)
    total = dict.fromkeys(KINDS, 0)
    for start in range(0, num_sets, 16):
        sets = [make_document_set(rng, shape, held_out=True) for _ in range(min(16, num_sets - start))]
        batch = collate([maker.question_row(made) for made in sets], maker.pad_id)
        logits, wanted = answer_logits(model, model(batch.ids, batch.positions, batch.visible), batch)
        wrong = torch.zeros_like(batch.is_target, dtype=torch.bool)
        wrong[:, 1:][batch.is_target[:, 1:] > 0] = logits.argmax(-1) != wanted
        for index, kinds in enumerate(batch.kinds):
            for number, kind in enumerate(kinds, start=1):
                total[kind] += 1
                right[kind] += not bool((wrong[index] & (batch.segments[index] == number)).any())
    scores = {kind: 100 * right[kind] / max(1, total[kind]) for kind in KINDS}
    return {"all": 100 * sum(right.values()) / sum(total.values()), **scores, "n": sum(total.values())}


class Trainer:
    """One run: owns weights, optimizer, random state and progress, and saves them together."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        tokenizer = load_tokenizer(args.tokenizer)
        self.maker = RowMaker(tokenizer)
        self.config = NetworkConfig(
            tokenizer.get_vocab_size(), args.layers, args.width, args.heads, args.head_width, args.hidden
        )
        self.model = Network(self.config)
        self.optimizer = Optimizer(self.model, args.muon_rate, args.adam_rate)
        self.rng = random.Random(args.seed)
        self.progress = Progress(level=args.start_level)
        self.checkpoint_path = args.out / "checkpoint.pt"
        if self.checkpoint_path.exists():
            self._restore()
        elif args.init is not None:
            self.model.load_state_dict(torch.load(args.init)["model"])
        self.forward = self.model if args.no_compile else torch.compile(self.model, dynamic=True)

    def run(self) -> None:
        progress, args = self.progress, self.args
        started = time.monotonic() - progress.seconds
        while progress.step < args.steps:
            self._step()
            progress.seconds = time.monotonic() - started
            if progress.step % args.save_every == 0 or progress.step == args.steps:
                last = progress.step == args.steps
                scores = exact_match(self.model, self.maker, 256 if last else 48)
                self._log(
                    {
                        **asdict(progress),
                        "exact_match": {key: round(value, 1) for key, value in scores.items()},
                    }
                )
                self._save()

    def _step(self) -> None:
        progress, args = self.progress, self.args
        batch = self._next_batch()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.forward(batch.ids, batch.positions, batch.visible)
            logits, wanted = answer_logits(self.model, hidden, batch)
            loss = F.cross_entropy(logits.float(), wanted)
            if progress.step >= args.restate_steps and progress.level < PASSAGES_LEARNT_FROM_LEVEL:
                passage, passage_wanted = passage_logits(self.model, hidden, batch)
                loss = loss + PASSAGE_LOSS_WEIGHT * F.cross_entropy(passage.float(), passage_wanted)
        loss.backward()
        self.optimizer.step(rate_factor(progress.step, args.steps, args.warmup, args.anneal))
        self.model.zero_grad(set_to_none=True)
        progress.step += 1
        progress.tokens += batch.ids.numel()
        if batch.kinds[0]:
            accuracy = (logits.argmax(-1) == wanted).float().mean().item()
            progress.accuracy += 0.03 * (accuracy - progress.accuracy)
            self._maybe_level_up()

    def _next_batch(self) -> Batch:
        """Restatements first; then mostly the current level, a fifth from one of the two below it."""
        progress, args, rng = self.progress, self.args, self.rng
        still_restating = progress.level < PASSAGES_LEARNT_FROM_LEVEL and rng.random() < RESTATEMENT_SHARE
        if progress.step < args.restate_steps or still_restating:
            return restatement_batch(self.maker, rng, (2, 4), args.batch_tokens)
        level = progress.level
        if level > 0 and rng.random() < 0.2:
            level = rng.randrange(max(0, level - 2), level)
        return question_batch(self.maker, rng, LEVELS[level], args.batch_tokens, QUESTIONS_PER_KIND)

    def _maybe_level_up(self) -> None:
        progress = self.progress
        steps_here = progress.step - max(progress.level_started, self.args.restate_steps)
        ready = progress.accuracy > self.args.level_up and steps_here >= MIN_STEPS_PER_LEVEL
        if ready and progress.level < len(LEVELS) - 1:
            progress.level += 1
            progress.level_started = progress.step
            progress.accuracy *= 0.8
            self._log({"level": progress.level, "step": progress.step})

    def _log(self, entry: dict) -> None:
        line = json.dumps(
            {key: round(value, 4) if isinstance(value, float) else value for key, value in entry.items()}
        )
        print(line, flush=True)
        with (self.args.out / "log.jsonl").open("a") as log:
            log.write(line + "\n")

    def _save(self) -> None:
        """Replace the checkpoint in one step, so that an interrupted run always finds a whole one."""
        partial = self.checkpoint_path.with_suffix(".partial")
        state = {
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.rng.getstate(),
            "progress": asdict(self.progress),
            "arguments": {key: str(value) for key, value in vars(self.args).items()},
        }
        torch.save(state, partial)
        partial.replace(self.checkpoint_path)

    def _restore(self) -> None:
        state = torch.load(self.checkpoint_path)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.setstate(state["random"])
        self.progress = Progress(**state["progress"])


def main() -> None:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    Trainer(args).run()


if __name__ == "__main__":
    main()
