# SPDX-License-Identifier: Apache-2.0
import ast
import json

import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner
from vllm_medusa.demo.padding import PaddedSizes, pad_heads, pad_target, verify_padding

from tests.toy.corpus import load_corpus, strip_prose
from tests.toy.muon import orthogonalise
from tests.toy.target import TargetConfig
from tests.toy.tokenizer import EOS_ID, cut_prompts, encode_documents, train_tokenizer
from tests.unit.tiny_targets import all_logits
from vllm_medusa.checkpoint.format import HeadsSpec
from vllm_medusa.cli import app
from vllm_medusa.demo.contenders import NATIVE_CHAIN, PLAIN, TREE, Comparison, Models, Run
from vllm_medusa.demo.engine import Decoded, Order
from vllm_medusa.demo.report import summarise, write_results
from vllm_medusa.training.heads import TrainableHeads

TINY = TargetConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
SIZES = PaddedSizes(
    hidden_size=128, intermediate_size=96, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4
)


@pytest.fixture(scope="module")
def small() -> LlamaForCausalLM:
    model = TINY.build().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    return model


def test_the_corpus_is_the_same_each_time_and_held_out_files_are_apart():
    corpus = load_corpus(50_000, 20_000)
    assert corpus == load_corpus(50_000, 20_000)
    assert sum(map(len, corpus.training)) >= 50_000
    assert sum(map(len, corpus.held_out)) >= 20_000
    assert not set(corpus.training) & set(corpus.held_out)
    assert load_corpus(0, 20_000) == type(corpus)((), corpus.held_out)


def test_code_keeps_its_meaning_without_prose():
    stripped = strip_prose('"""A."""\n\ndef f(x):\n    "B."  # C\n    return "D."\n\nclass E:\n    """F."""\n')
    assert stripped == "def f(x):\n    return 'D.'\n\nclass E:\n    pass"
    ast.parse(stripped)


def test_a_saved_tokenizer_is_loaded_by_name(tmp_path):
    from transformers import AutoTokenizer

    text = "def f(x):\n    return x + 1\n"
    tokenizer = train_tokenizer([text], vocab_size=280)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.bos_token, loaded.eos_token) == ("<s>", "</s>")
    ids = loaded(text).input_ids
    assert loaded.decode(ids, skip_special_tokens=True) == text
    assert encode_documents(tokenizer, [text]) == [[*ids, EOS_ID]]
    assert ids[0] == loaded.bos_token_id


def test_prompts_do_not_overlap():
    prompts = cut_prompts([range(50), range(50, 100)], lengths=[3, 10], count=8)
    assert [len(prompt) for prompt in prompts] == [3, 10] * 4
    tokens = [token for prompt in prompts for token in prompt]
    assert len(tokens) == len(set(tokens))
    with pytest.raises(ValueError, match="do not hold"):
        cut_prompts([range(50)], lengths=[10], count=6)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 40), (2, 40, 16)])
def test_updates_become_orthogonal(shape):
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert values.max() < 1.3
    assert values.median() > 0.6


def test_a_padded_model_says_the_same(small):
    padded = pad_target(small, SIZES)
    assert padded.config.hidden_size == 128
    assert padded.config.num_hidden_layers == 5
    tokens = torch.randint(300, (2, 40))
    assert verify_padding(small, padded, tokens) < 1e-4


def test_a_padded_model_that_says_something_else_is_noticed(small):
    padded = pad_target(small, SIZES)
    with torch.no_grad():
        padded.model.norm.weight *= 1.01
    with pytest.raises(ValueError, match="logits"):
        verify_padding(small, padded, torch.randint(300, (1, 8)))


@pytest.mark.parametrize("change", [{"hidden_size": 16}, {"num_key_value_heads": 8}])
def test_sizes_that_cannot_hold_the_model_are_refused(small, change):
    from dataclasses import replace

    with pytest.raises(ValueError):
        pad_target(small, replace(SIZES, **change))


def test_padded_heads_predict_the_same():
    spec = HeadsSpec(hidden_size=8, vocab_size=16, num_heads=2)
    heads = TrainableHeads(spec, torch.randn(16, 8))
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    wide_spec, wide_state = pad_heads(spec, heads.state_dict(), 32)
    wide = TrainableHeads(wide_spec, torch.zeros(16, 32))
    wide.load_state_dict(wide_state)
    hidden = torch.randn(5, 8)
    wide_hidden = torch.cat([hidden, torch.zeros(5, 24)], dim=1)
    torch.testing.assert_close(all_logits(wide, wide_hidden), all_logits(heads, hidden))


def test_each_contender_gets_the_engine_it_stands_for(tmp_path):
    models = Models(tmp_path / "target", tmp_path / "heads")
    comparison = Comparison(models, models, "float32", 4, {TREE: {"medusa_tree": [[0], [1]]}}, Order([[1]], 8), [])
    configs = {name: comparison.speculative_config(name, models.heads) for name in (PLAIN, NATIVE_CHAIN, TREE)}
    heads = str(tmp_path / "heads")
    assert configs == {
        PLAIN: None,
        NATIVE_CHAIN: {"method": "medusa", "model": heads, "num_speculative_tokens": 4},
        TREE: {"method": "medusa", "model": heads, "medusa_tree": [[0], [1]]},
    }


def test_results_say_what_was_measured(tmp_path):
    plain_text, other = [1, 2, 3, 4, 5], [1, 2, 3, 4, 9]
    plain = Run(
        Decoded([plain_text] * 2, 8.0, 0, 0, 0), [Decoded([plain_text], seconds, 0, 0, 0) for seconds in (4, 2, 1)]
    )
    fast = Run(
        Decoded([plain_text, other], 4.0, drafts=4, drafted=14, accepted=6),
        [Decoded([text], seconds, 2, 9, 3) for text, seconds in ((plain_text, 2), (other, 0.5), (plain_text, 1))],
    )
    summary = summarise({PLAIN: plain, TREE: fast})
    assert summary[PLAIN]["tokens_per_second"] == 2
    assert summary[PLAIN]["tokens_per_step"] == 1
    assert summary[PLAIN]["speedup"] == 1
    assert summary[TREE]["tokens_per_second"] == 4
    assert summary[TREE]["tokens_per_step"] == 2.5
    assert (summary[PLAIN]["drafted_tokens"], summary[TREE]["drafted_tokens"]) == (0, 3.5)
    assert summary[TREE]["speedup"] == 2
    assert (summary[TREE]["identical_texts"], summary[TREE]["texts"]) == (1, 2)
    assert summary[TREE]["identical_share_timed"] == pytest.approx(2 / 3)

    write_results(tmp_path / "results.json", summary, {"rounds": 3})
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["runs"] == summary
    assert results["machine"]["cores"] >= 1
    assert results["versions"].keys() >= {"python", "torch", "transformers", "vllm", "vllm_medusa"}


def test_the_command_line_explains_itself():
    result = CliRunner().invoke(app, ["demo", "--help"])
    assert result.exit_code == 0
    assert "--rounds" in result.output


def test_the_command_line_is_light_to_import():
    import subprocess
    import sys

    code = (
        "import sys, vllm_medusa.cli; sys.exit(any(name in sys.modules for name in ('torch', 'vllm', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
