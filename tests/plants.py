# ruff: noqa: E501  (a table of places, each on a line)
"""Classic bugs put back into a copy of the source: the tests that prove them away must turn red.

    python tests/plants.py              all of them, some 15 minutes; ends with 1 if one survives
    python tests/plants.py --only 17    those of one trap

Each changes one place. tests/test_layout.py holds that every place is still there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "lorimer"


@dataclass(frozen=True, slots=True)
class Plant:
    """`old` in `file` becomes `new`: the bugs of these traps, in words."""

    traps: tuple[int, ...]
    what: str
    file: str
    old: str
    new: str


PLANTS = (
    Plant(
        (1, 2), "the end of a turn is not trained", "data/template.py",
        "inside = [stop for _, stop in self.tokenizer.control_spans(text[first:end])]",
        "inside = [start for start, _ in self.tokenizer.control_spans(text[first:end])]",
    ),
    Plant(
        (3,), "the first token of a row is doubled", "data/template.py",
        "        eos = self.tokenizer.eos_id\n",
        "        ids, trained = [*ids[:1], *ids], [*trained[:1], *trained]\n        eos = self.tokenizer.eos_id\n",
    ),
    Plant(
        (4,), "inference feeds no generation prompt", "data/template.py",
        "text = chat.first_text(len(messages), generation=True)\n        starts",
        "text = chat.first_text(len(messages), generation=False)\n        starts",
    ),
    Plant(
        (5,), "a prompt that the whole chat does not keep is not noticed", "data/template.py",
        "if prompt is None or not text.startswith(prompt):", "if prompt is None:",
    ),
    Plant(
        (6,), "prompt and answer are encoded as one text", "data/tokenizer.py",
        "            for part_ids, starts in self._encode_piece(own + rest, begins=begins):\n",
        "            if ids and not own:\n                continue\n"
        "            for part_ids, starts in self._encode_piece(own.lstrip() + rest, begins=begins):\n",
    ),
    Plant(
        (7, 8), "the prompt is trained too", "data/template.py",
        "    flags[:1] = False\n    return Example(np.array", "    flags[1:] = True\n    return Example(np.array",
    ),
    Plant(
        (9, 10, 32), "a row without trained tokens is kept", "data/prepare.py",
        "(kept if example.trained.any() else lost).append(example)", "kept.append(example)",
    ),
    Plant(
        (10,), "preflight passes rows without trained tokens", "train/preflight.py",
        "    if empty:\n", "    if False:\n",
    ),
    Plant(
        (11,), "a loss that is not finite goes on", "train/step.py",
        "if not math.isfinite(value):", "if False:",
    ),
    Plant(
        (12, 14, 15), "a pack's loss is divided by its own tokens", "train/step.py",
        "decoder, pack, weight=scale / trained, smoothing", "decoder, pack, weight=scale / pack.trained_tokens, smoothing",
    ),
    Plant(
        (13,), "the loss is divided by all tokens of a step", "train/step.py",
        "    trained = sum(pack.trained_tokens for pack in packs)\n    total = 0.0\n",
        "    trained = sum(pack.trained_tokens + len(pack.rows) for pack in packs)\n    total = 0.0\n",
    ),
    Plant(
        (17,), "rows of a pack attend to each other", "model/decoder.py",
        "        rows = PackRows(lengths, prefix, self.device)\n        hidden_TH = self.embed(ids_T, rows)\n        last",
        "        rows = PackRows((sum(lengths),), prefix, self.device)\n        hidden_TH = self.embed(ids_T, rows)\n        last",
    ),
    Plant(
        (18,), "a row's first token is predicted by the row before it", "data/pack.py",
        "trained = np.flatnonzero(examples[i].trained[1:]) + 1\n        before", "trained = np.flatnonzero(examples[i].trained)\n        before",
    ),
    Plant(
        (19,), "long rows are left out in silence", "data/prepare.py",
        'notes.append(f"{split}: {what}; {done}', 'str(f"{split}: {what}; {done}',
    ),
    Plant(
        (20,), "packs grow beyond the limit", "data/pack.py",
        "if left >= size), None)", "if left >= 0), None)",
    ),
    Plant(
        (21, 22), "the validation loss is a mean over packs", "train/loop.py",
        "loss = total / sum(pack.trained_tokens for pack in self.valid_packs)",
        "loss = total / len(self.valid_packs)",
    ),
    Plant(
        (23,), "rows of train in test are not seen", "data/checks.py",
        "            if key in known:\n", "            if False:\n",
    ),
    Plant(
        (23,), "near duplicates are not seen", "data/near.py",
        "        if best >= least:\n", "        if best > 1:\n",
    ),
    Plant(
        (24,), "the shuffle forgets the seed", "data/batch.py",
        "np.random.PCG64([self.seed, epoch])", "np.random.PCG64([0, epoch])",
    ),
    Plant(
        (26,), "markers in a message are not hidden", "data/template.py",
        "            return self.tokenizer.hide(text, own_words=own)\n", "            return text\n",
    ),
    Plant(
        (26,), "halves of a marker in two messages become one", "data/tokenizer.py",
        "                text = body[:-size] + self._alias_of(body[-size:]) + text[len(body) :]\n", "",
    ),
    Plant(
        (5,), "an answer that a longer chat changes is trained as it stands there", "data/template.py",
        "if end < len(own) and not self.tokenizer.control_spans(text[len(prompt) : end]):", "if False:",
    ),
    Plant(
        (29,), "a chat without an answer is taken", "data/conversation.py",
        'if not any(message.role == "assistant" for message in messages):', "if False:",
    ),
    Plant(
        (30,), "the BOM stays in the first row", "data/row_files.py",
        "            raw = raw.removeprefix(BOM)\n", "",
    ),
    Plant(
        (31,), "a file is read in the system's encoding", "run.py",
        'self.record.read_text(encoding="utf-8")', "self.record.read_text()",
    ),
    Plant(
        (35,), "a module that does not exist is passed over", "lora/targets.py",
        "if not any(_ends(path, name) for path in (*tables, *(target.path for target in targets))):", "if False:",
    ),
    Plant(
        (40,), "rsLoRA is scaled as LoRA", "lora/layers.py",
        "(math.sqrt(rank) if self.rslora else rank)", "rank",
    ),
    Plant(
        (41,), "a head that was trained apart stays tied in the merged config", "lora/merge.py",
        "    if untied(spec, adapter):\n", "    if False:\n",
    ),
    Plant(
        (44,), "untrained control tokens pass", "train/preflight.py",
        "if norm <= least]", "if norm < 0]",
    ),
    Plant(
        (45,), "the adapter is kept in bf16", "lora/layers.py",
        "torch.empty(total, dtype=torch.float32, device=device)", "torch.empty(total, dtype=torch.bfloat16, device=device)",
    ),
    Plant(
        (46,), "nobody looks where NaN comes from", "train/step.py",
        "module = decoder.first_not_finite(ids_T, pack.lengths, pack.prefix)", "module = None",
    ),
    Plant(
        (49,), "missing and extra keys are passed over", "lora/adapter.py",
        "    if wanted != found:\n", "    if False:\n",
    ),
    Plant(
        (50,), "an adapter for another base is taken", "lora/adapter.py",
        "if made_for and made_for != fingerprint:", "if False:",
    ),
    Plant(
        (51, 52), "both ways of merging are said to agree", "cli/merge.py",
        "    found = {way: _compare(model, way, dtype, examples) for way in WAYS}\n",
        '    found = {way: _compare(model, "original", dtype, examples) for way in WAYS}\n',
    ),
    Plant(
        (37,), "a transposed weight is written as it is computed", "lora/merge.py",
        "tensor.t().contiguous() if is_transposed(spec, name) else tensor", "tensor",
    ),
    Plant(
        (38,), "rows of a fused weight go to files in the stack's order", "lora/layers.py",
        "tensor if order is None else tensor.index_select(0, order.argsort())", "tensor",
    ),
    Plant(
        (38,), "gate and up of an expert get the gate's update", "lora/merge.py",
        ".chunk(parts)[part]", ".chunk(parts)[0]",
    ),
    Plant(
        (39,), "experts' updates find no weight, and nobody asks", "lora/merge.py",
        "    lost = sorted(set(adapter.tensors) - used - tied)", "    lost = list[str]()",
    ),
    Plant(
        (42,), "a trained embedding is not scaled", "model/decoder.py",
        "if spec.embedding_scale != 1.0:", "if spec.embedding_scale != 1.0 and self.embedding.trained is None:",
    ),
    Plant(
        (42,), "an embedding's LoRA is added after the scale", "kernels/tables.py",
        "return (self.a.index_select(1, ids_T).t() @ self.b.t()) * self.scale",
        "return (self.a.index_select(1, ids_T).t() @ self.b.t()) * self.scale / self.b.shape[0] ** 0.5",
    ),
    Plant(
        (43,), "new rows are written behind a padded vocabulary", "model/grow.py",
        "grown[len(rows) :] = grown[list(self.added_ids)] = self._begin[name]",
        "grown[-len(self.added_ids) :] = self._begin[name]",
    ),
    Plant(
        (43,), "new rows are not trained, and not saved", "lora/adapter.py",
        "if tokens and path not in full}", "if path in full}",
    ),
    Plant(
        (41,), "a tied head that has LoRA is merged as if it were the embedding", "lora/merge.py",
        "return bool(full or {names.head, names.embedding} & set(adapter.spec.ranks))", "return bool(full)",
    ),
    Plant(
        (53,), "the update is added in the written type", "lora/merge.py",
        "        value = trained_weight(base, spec, stored, quant).float()\n        merged",
        "        value = trained_weight(base, spec, stored, quant).to(dtype)\n        merged",
    ),
    Plant(
        (56,), "YaRN interpolates every feature", "model/rope.py",
        "return plain_F / factor * ramp_F + plain_F * (1 - ramp_F), _yarn_attention(factor, spec)",
        "return plain_F / factor, _yarn_attention(factor, spec)",
    ),
    Plant(
        (24,), "each epoch has the order of the first", "data/batch.py",
        "order = self._order(epoch)", "order = self._order(0)",
    ),
    Plant(
        (59,), "the order begins anew after a resume", "train/loop.py",
        "rows = self.stream.step_rows(step)", "rows = self.stream.step_rows(step - (self.saved_step or 0))",
    ),
    Plant(
        (66,), "steps are counted from one", "data/batch.py",
        "epoch, part = divmod(step, self.steps_per_epoch)\n        order", "epoch, part = divmod(step + 1, self.steps_per_epoch)\n        order",
    ),
    Plant(
        (60,), "dropout draws from a generator that goes on", "lora/layers.py",
        'generator = _generator(self.seed, f"dropout/{step}/{inputs}")',
        "generator = torch.Generator().manual_seed(int(torch.randint(1 << 40, ()).item()))",
    ),
    Plant(
        (61,), "the learning rate begins anew after a resume", "train/loop.py",
        "rate = learning_rate(self.config.train, step, total)",
        "rate = learning_rate(self.config.train, step - (self.saved_step or 0), total)",
    ),
    Plant(
        (62, 65), "changed settings are taken on resume", "train/resume.py",
        "if old.get(key) != value and not allowed:", "if False:",
    ),
    Plant(
        (63,), "a damaged checkpoint is used", "train/checkpoint.py",
        "        if damage is None:\n", "        if True:\n",
    ),
    Plant(
        (63,), "a folder is written under its own name", "storage.py",
        '    staged = path.with_name(f"{STAGED}{path.name}-{os.getpid()}")\n    with storage_errors(path):\n        try:\n            shutil.rmtree',
        '    staged = path.with_name(f"{path.name}")\n    with storage_errors(path):\n        try:\n            shutil.rmtree',
    ),
    Plant(
        (64,), "old checkpoints are deleted down to one", "train/checkpoint.py",
        "    for step in run.saved_steps()[:-keep]:\n", "    for step in run.saved_steps():\n",
    ),
    Plant(
        (65,), "the optimizer begins anew", "train/optimizer.py",
        "            tensor.copy_(state[name])\n", "            tensor.zero_()\n",
    ),
    Plant(
        (16,), "smoothed labels are not shifted", "data/pack.py",
        "        labels.append(examples[i].ids[trained])\n",
        "        labels.append(examples[i].ids[before])\n",
    ),
    Plant(
        (16,), "smoothing is spread by each pack's own tokens", "train/step.py",
        "weight=scale / trained, smoothing=smoothing", "weight=scale / trained, smoothing=smoothing * pack.trained_tokens / trained",
    ),
    Plant(
        (27,), "a system prompt is put between quotes of the template", "data/template.py",
        '{"role": message.role, "content": hide(message.content)}',
        """{"role": message.role, "content": hide(message.content if message.role != "system" else CompiledTemplate('{{ "' + message.content + '" }}').render({}))}""",
    ),
    Plant(
        (28,), "what stands for a hidden marker stays in the text", "data/tokenizer.py",
        "        return self.show(text)\n", "        return text\n",
    ),
    Plant(
        (33,), "a cell of a table has the csv module's own limit", "data/row_files.py",
        "csv.field_size_limit(2**31 - 1)", "csv.field_size_limit()",
    ),
    Plant(
        (34,), "the tokenizer's own limit cuts a text", "data/tokenizer.py",
        "        self._plain.no_truncation()\n", "",
    ),
    Plant(
        (34,), "a row is cut at model_max_length", "data/tokenizer.py",
        "        return ids, trained\n\n    def _encode_piece",
        '        limit = int(self.config.get("model_max_length") or 1 << 60)\n'
        "        return ids[:limit], trained[:limit]\n\n    def _encode_piece",
    ),
    Plant(
        (36,), "modules are saved by their names, whichever layers they are in", "lora/adapter.py",
        "    if product != chosen or", "    if False and",
    ),
    Plant(
        (47,), "a layer is computed again only for inputs that have gradients", "model/recompute.py",
        'use_reentrant=False, preserve_rng_state=False, determinism_check="none"', "use_reentrant=True, preserve_rng_state=False",
    ),
    Plant(
        (47,), "the factors of a projection that is computed again get no gradient", "model/recompute.py",
        "    output: Tensor = checkpoint(\n        run, number, hidden_TH,",
        "    output: Tensor = checkpoint(\n        run, number, hidden_TH.detach(),",
    ),
    Plant(
        (48,), "an adapter that is trained further is frozen", "lora/adapter.py",
        "        adapter.take(name, files.tensors[name])\n    adapter.refresh()\n",
        "        adapter.take(name, files.tensors[name])\n    adapter.refresh()\n"
        "    for group, _ in adapter._groups:\n        group.adapted.factors = ()\n",
    ),
    Plant(
        (48, 54), "the base decays with the adapter", "train/step.py",
        "            norm = optimizer.step(learning_rate, scale)\n",
        "            norm = optimizer.step(learning_rate, scale)\n            decoder.final_norm.weight_H.mul_(1 - learning_rate)\n",
    ),
    Plant(
        (54,), "the update is added to the base in memory", "lora/merge.py",
        "return value + adapter.spec.scale(module) * (up_OR @ adapter.for_files(down))",
        "return value.add_(adapter.spec.scale(module) * (up_OR @ adapter.for_files(down)))",
    ),
    Plant(
        (54,), "B is scaled where it lies while merging", "lora/layers.py",
        "        tensor, order = self.tensors[name].detach(), self.orders.get(name)\n",
        "        tensor, order = self.tensors[name].detach(), self.orders.get(name)\n"
        '        tensor.mul_(self.spec.scale(name.removesuffix(".lora_B.weight")) if "lora_B" in name else 1)\n',
    ),
    Plant(
        (55,), "dropout stays on in evaluation", "model/loss.py",
        "        return pack_loss(decoder, pack, weight=1.0)[1]\n",
        "        from lorimer.lora.layers import LoraDropout\n\n"
        "        dropout = LoraDropout(0.5, 0, decoder.dtype, decoder.device)\n"
        "        masks = dropout.for_pack(0, pack.rows, pack.lengths)\n"
        "        return pack_loss(decoder, pack, weight=1.0, dropouts=masks)[1]\n",
    ),
    Plant(
        (55,), "dropout is off in training", "train/step.py",
        "masks = dropout.for_pack(step, pack.rows, pack.lengths) if dropout else None", "masks = None",
    ),
    Plant(
        (57,), "the two numbers of a byte change places", "quant/nf4.py",
        "torch.stack([packed >> 4, packed & 15], 1)", "torch.stack([packed & 15, packed >> 4], 1)",
    ),
    Plant(
        (57,), "scales that were quantised come back without their mean", "quant/part.py",
        " * self.absmax_scale[numbers] + self.absmax_offset", " * self.absmax_scale[numbers]",
    ),
    Plant(
        (57,), "the blocks of a strip begin at its own first row", "quant/nf4.py",
        "values.mul_(scales[start % size :][: stop - start])", "values.mul_(scales[: stop - start])",
    ),
    Plant(
        (58,), "the rows of a batch share one position", "model/decoder.py",
        "turns = self.rope.at(cache.lengths)", "turns = self.rope.at([max(cache.lengths)] * len(cache.lengths))",
    ),
    Plant(
        (58,), "a row of a batch sees as far as the longest", "model/decoder.py",
        "lengths_B = torch.tensor(cache.lengths, device=self.device)\n\n        def step",
        "lengths_B = torch.full((len(cache.lengths),), max(cache.lengths), device=self.device)\n\n        def step",
    ),
)  # fmt: skip


def proofs() -> dict[int, list[str]]:
    sys.path.insert(0, str(ROOT / "docs"))
    from traps import proofs as found

    return found()


def survives(plant: Plant) -> str | None:
    """None if the tests notice, else what they said."""
    found = proofs()
    tests = sorted({test for trap in plant.traps for test in found.get(trap, [])})
    with tempfile.TemporaryDirectory(prefix="lorimer-plant-") as scratch:
        copy = Path(scratch) / "lorimer"
        shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        file = copy / plant.file
        text = file.read_text(encoding="utf-8")
        assert text.count(plant.old) == 1, f"{plant.file} has no single place for: {plant.what}"
        file.write_text(text.replace(plant.old, plant.new), encoding="utf-8")
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-x",
                "-p",
                "no:cacheprovider",
                *(f"tests/{t}" for t in tests),
            ],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": scratch, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    return None if done.returncode == 1 else f"exit code {done.returncode}: {done.stdout[-300:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Put bugs back and see the tests turn red.")
    parser.add_argument("--only", type=int, help="the plants of one trap")
    args = parser.parse_args()
    began, bad, count = time.perf_counter(), 0, 0
    for plant in PLANTS:
        if args.only is not None and args.only not in plant.traps:
            continue
        count += 1
        said = survives(plant)
        bad += said is not None
        traps = ", ".join(map(str, plant.traps))
        print(
            f"{'red ' if said is None else 'GREEN'} {traps}: {plant.what}{f' ({said})' if said else ''}",
            flush=True,
        )
    print(f"{count} bugs planted, {bad} not noticed, {time.perf_counter() - began:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
