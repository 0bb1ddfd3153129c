# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.unit.tiny_targets import VOCABULARY, build, counting
from vllm_medusa.checkpoint.conversion import Layout, convert
from vllm_medusa.checkpoint.format import read_spec, read_state, write_heads
from vllm_medusa.data.packing import IGNORED
from vllm_medusa.training.config import TrainConfig
from vllm_medusa.training.heads import TrainableHeads
from vllm_medusa.training.hidden import final_hidden_states, lm_head_of
from vllm_medusa.training.load import load_tokenizer
from vllm_medusa.training.run import load_data, prepare, run_training


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Texts that count up: ``n3 n4 n5 ...``."""
    file = tmp_path_factory.mktemp("data") / "texts.jsonl"
    texts = [" ".join(f"n{token}" for token in row) for row in counting(48, 0, 40).tolist()]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    """A model whose LM head is the embedding."""
    directory = tmp_path_factory.mktemp("target")
    build("qwen3").save_pretrained(directory)
    words = Tokenizer(models.WordLevel({f"n{token}": token for token in range(VOCABULARY)}, unk_token="n0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="n2").save_pretrained(directory)
    return directory


@pytest.fixture
def settings(target, data, tmp_path) -> dict[str, object]:
    shape = {"num_heads": 2, "block_length": 24, "batch_size": 8, "warmup_steps": 1, "steps": 6, "save_steps": 3}
    files = {"target": str(target), "data": (data,), "output": tmp_path / "out"}
    return {**files, **shape, "learning_rate": 1e-2, "lora_rank": 2}


def medusa1(settings: dict[str, object], **changes: object) -> TrainConfig:
    return TrainConfig(**(settings | {"lora_rank": 32} | changes))


def medusa2(settings: dict[str, object], **changes: object) -> TrainConfig:
    return TrainConfig(**(settings | {"method": "medusa2"} | changes))


def run(config: TrainConfig):
    result = run_training(config, ["vllm-medusa", "train"], show_progress=False)
    assert result is not None
    return result


def test_medusa_1_writes_heads_and_how_they_came_about(settings):
    config = medusa1(settings)
    result = run(config)
    assert read_spec(result.heads).num_heads == 2
    assert read_state(result.heads)
    assert result.target is None
    written = yaml.safe_load((config.output / "run.yaml").read_text())
    assert TrainConfig(**written["config"]) == config
    assert written["command"] == ["vllm-medusa", "train"]
    figures = json.loads((config.output / "results.json").read_text())
    assert figures["after"]["accuracies"] == result.after.accuracies
    heads_config = json.loads((result.heads / "config.json").read_text())
    assert heads_config["medusa_accuracies"] == result.after.accuracies
    assert heads_config["base_model_name_or_path"] == config.target


def test_heads_of_either_method_can_be_converted_without_saying_whose_they_are(settings, tmp_path):
    for config in (medusa1(settings), medusa2(settings, resume="never")):
        result = run(config)
        output = tmp_path / config.method
        convert(result.heads, output, Layout.ORIGINAL)
        named = json.loads((output / "config.json").read_text())["base_model_name_or_path"]
        assert named == str(result.target or config.target)


def test_heads_are_written_in_the_targets_dtype_and_shared_ones_with_their_lm_head(settings, target):
    result = run(medusa1(settings, dtype="bfloat16", shared_lm_head=True))
    state = read_state(result.heads)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    lm_head = lm_head_of(AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)).weight
    assert torch.equal(state["lm_heads.0.weight"], lm_head)


@pytest.mark.parametrize("changes", [{}, {"distill": True}, {"target_training": "full"}])
def test_medusa_2_writes_a_target_that_predicts_as_it_was_trained_to(settings, data, changes):
    result = run(medusa2(settings, dtype="float32", held_out=(data,), **changes))
    assert result.before is not None
    assert result.target is not None
    target = AutoModelForCausalLM.from_pretrained(result.target)
    tokenizer = AutoTokenizer.from_pretrained(result.target)
    heads = TrainableHeads(read_spec(result.heads), torch.zeros(VOCABULARY, 32))
    heads.load_state_dict(read_state(result.heads))
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    tokens = torch.tensor(tokenizer(texts)["input_ids"])[:, :24]
    with torch.no_grad():
        lm_loss = target(input_ids=tokens, labels=tokens).loss.item()
        head = heads.logits(0, final_hidden_states(target, tokens)).argmax(-1)[:, :-2]
    # These are the beginnings of the texts; the run's metrics also cover their ends, in blocks of 24 tokens.
    assert lm_loss == pytest.approx(result.after.lm_loss, abs=0.1)
    assert (head == tokens[:, 2:]).float().mean().item() == pytest.approx(result.after.top1[0], abs=0.15)


def test_a_finished_run_that_is_started_again_gives_the_same(settings):
    first = run(medusa1(settings))
    state = read_state(first.heads)
    again = run(medusa1(settings, save_limit=1, logging_steps=1))
    assert again.after == first.after
    assert all(torch.equal(tensor, state[name]) for name, tensor in read_state(again.heads).items())


def test_other_settings_do_not_go_on_from_a_checkpoint(settings):
    run(medusa1(settings))
    with pytest.raises(ValueError, match=r"holds the checkpoints of a run with learning_rate 0\.01, got 0\.02; give"):
        run(medusa1(settings, learning_rate=0.02))
    assert run(medusa1(settings, learning_rate=0.02, resume="never")).steps == 6


def test_the_table_tells_before_from_after(settings):
    console = Console(record=True, width=100)
    result = run(medusa2(settings))
    result.print(console)
    text = console.export_text()
    assert f"{result.before.lm_loss:.4f}" in text
    assert f"{result.after.lm_loss:.4f}" in text
    assert "head 2, top-1 accuracy" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_length": 4096}, r"data gives 1 blocks of 4096 tokens \(block_length\), but 2 are needed"),
        ({"target": "/nowhere"}, "target '/nowhere' has no tokenizer"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        run(medusa1(settings, **changes))
    assert not Path(str(settings["output"])).exists()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("method", ["medusa1", "medusa2"])
def test_heads_of_a_draft_vocabulary_are_written_with_their_tokens_and_its_coverage(settings, method, shared, tmp_path):
    lora = {"lora_rank": 2 if method == "medusa2" else 32}
    config = TrainConfig(**(settings | lora), method=method, draft_vocab=10, shared_lm_head=shared, heads_loss="kl")
    result = run(config)
    spec, state = read_spec(result.heads), read_state(result.heads)
    assert (spec.vocab_size, spec.draft_vocab_size, spec.shared_lm_head) == (VOCABULARY, 10, shared)
    assert state["token_map"].dtype == torch.int64
    assert len(state["token_map"].unique()) == 10
    assert len(state["lm_heads.0.weight"]) == 10
    assert sum(name.startswith("lm_heads.") for name in state) == (1 if shared else 2)
    figures = json.loads((config.output / "results.json").read_text())
    assert figures["coverage"]["size"] == 10
    assert 10 / VOCABULARY < figures["coverage"]["training"] < 1
    console = Console(record=True, width=200)
    result.print(console)
    assert f"{figures['coverage']['training']:.2%} of the training text's" in console.export_text()


def test_prompts_may_be_learnt_but_neither_held_out_figures_nor_the_draft_vocabulary_are_of_them(settings, tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [[f"n{token}" for token in row] for row in counting(48, 0, 20).tolist()]
    pairs = [{"prompt": " ".join(row[:12]), "completion": " " + " ".join(row[12:])} for row in rows]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tasks = []
    for labels in ("answers", "all"):
        config = medusa1(settings, data=(file,), labels=labels, draft_vocab=10)
        blocks, held_out = load_data(config, load_tokenizer(config))
        tasks.append(prepare(config, blocks, held_out, torch.device("cpu"), show_progress=False))
    answers, everything = tasks
    assert answers.coverage == everything.coverage
    assert answers.model.heads.token_map.equal(everything.model.heads.token_map)
    assert answers.held_out[:]["labels"].equal(everything.held_out[:]["labels"])
    assert (answers.training[:]["labels"] == IGNORED).float().mean() > 0.5
    assert (everything.training[:]["labels"] != IGNORED).sum() > 2 * (answers.training[:]["labels"] != IGNORED).sum()


def test_a_draft_vocabulary_as_large_as_the_targets_is_refused(settings):
    with pytest.raises(ValueError, match=f"draft_vocab must be less than {VOCABULARY}"):
        run(medusa1(settings, draft_vocab=VOCABULARY))


@pytest.mark.parametrize("sizes", [{}, {"draft_vocab": 10, "shared_lm_head": True}, {"path_rank": 4}])
def test_a_run_goes_on_with_heads_of_another_run(settings, sizes, tmp_path):
    first = run(medusa1(settings, **sizes))
    kept = {name: value for name, value in sizes.items() if name != "draft_vocab"}
    more = {**settings, **kept, "output": tmp_path / "more", "initial_heads": first.heads}
    unchanged = run(medusa1(more, learning_rate=1e-12))
    assert unchanged.after.top1 == first.after.top1
    state = read_state(first.heads)
    again = read_state(unchanged.heads)
    assert again.keys() == state.keys()
    for name, tensor in again.items():
        torch.testing.assert_close(tensor, state[name], msg=name)


def test_initial_heads_that_share_the_targets_lm_head_may_get_another_draft_vocabulary(settings, tmp_path):
    first = run(medusa1(settings, draft_vocab=10, shared_lm_head=True))
    more = settings | {"output": tmp_path / "more", "initial_heads": first.heads}
    wider = run(medusa1(more, draft_vocab=12, shared_lm_head=True, learning_rate=1e-12))
    state, again = read_state(first.heads), read_state(wider.heads)
    assert len(again["token_map"]) == len(again["lm_heads.0.weight"]) == 12
    torch.testing.assert_close(again["blocks.0.layers.0.weight"], state["blocks.0.layers.0.weight"])


@pytest.mark.parametrize(("changes", "name"), [({"num_layers": 2}, "num_layers"), ({"num_heads": 3}, "num_heads")])
def test_initial_heads_of_other_sizes_are_refused(settings, changes, name, tmp_path):
    first = run(medusa1(settings, draft_vocab=10))
    more = settings | {"output": tmp_path / "more", "initial_heads": first.heads}
    with pytest.raises(ValueError, match=rf"initial_heads '.*/heads' has {name} \d+, the run \d+; give the run the"):
        run(medusa1(more | changes))
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize("size", [9, 10])
def test_initial_heads_with_their_own_lm_heads_keep_their_draft_vocabulary(settings, size, tmp_path):
    first = run(medusa1(settings, draft_vocab=10))
    more = settings | {"output": tmp_path / "more", "initial_heads": first.heads}
    with pytest.raises(ValueError, match=rf"draft_vocab must be left out with initial_heads '.*/heads', got {size}"):
        run(medusa1(more, draft_vocab=size))
    assert not (tmp_path / "more").exists()


def test_initial_heads_without_biases_go_on_with_biases_of_zero(settings, tmp_path):
    first = run(medusa1(settings))
    state = {name: each for name, each in read_state(first.heads).items() if not name.endswith(".bias")}
    without = write_heads(tmp_path / "heads", replace(read_spec(first.heads), fc_bias=False), state)
    more = settings | {"output": tmp_path / "more", "initial_heads": without}
    for name, tensor in read_state(run(medusa1(more, learning_rate=1e-12)).heads).items():
        torch.testing.assert_close(tensor, state.get(name, torch.zeros_like(tensor)), msg=name)
