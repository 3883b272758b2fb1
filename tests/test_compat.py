"""Each private or undocumented name of other libraries that the package relies on is there, and is what it was."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest
import torch
import transformers
import trl
import trl.trainer.utils
from peft import IA3Config, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models
from torch import nn
from transformers import masking_utils

from align import compat
from align.compat import deepspeed as of_deepspeed
from align.compat import others as of_others
from align.compat import peft as of_peft
from align.compat import transformers as of_transformers
from align.compat import trl as of_trl
from tests import ranks
from tests.worlds import save_tiny_pair_model, tiny_llama

ROOT = Path(__file__).parents[1]
FUSED = of_trl.has_fused_head()


def load(path: str):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(
    ("owner", "method", "parameters"),
    [(owner, method, names) for owner, methods in compat.OVERRIDDEN.items() for method, names in methods.items()],
)
def test_what_subclasses_override(owner, method, parameters):
    found = inspect.signature(getattr(load(owner), method)).parameters
    assert set(parameters) <= set(found)


def test_trainers_have_the_base_classes_whose_methods_are_overridden():
    base = load("trl.trainer.base_trainer._BaseTrainer")
    assert issubclass(trl.SFTTrainer, base)
    assert issubclass(trl.RewardTrainer, base)
    assert issubclass(base, transformers.Trainer)


@pytest.mark.parametrize("trainer", [trl.SFTTrainer, trl.RewardTrainer])
@pytest.mark.parametrize("name", [of_trl.TRAINER_METRICS, of_trl.TRAINER_TOKENS])
def test_attributes_of_trl_trainers(trainer, name):
    assert f"self.{name} = " in inspect.getsource(trainer.__init__)


def callers(source: str, *names: str) -> set[str]:
    """The methods of a class that call one of these functions or methods."""
    methods = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.FunctionDef)]
    return {
        method.name
        for method in methods
        for node in ast.walk(method)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(names)
    }


class TestPickles:
    """All places at which a Trainer reads or writes them; `SafeCheckpoints` overrides each that is reached."""

    source = inspect.getsource(transformers.Trainer)

    def test_reading(self):
        found = callers(
            self.source, "torch.load", "deepspeed_load_checkpoint", "load_sharded_checkpoint", "load_adapter"
        )
        unreached = {"_load_optimizer_and_scheduler", "_load_scaler"}  # from `_prepare_for_training`, with a checkpoint
        assert found - unreached <= OVERRIDDEN
        assert callers(self.source, *unreached) == {"_prepare_for_training"}

    def test_writing(self):
        found = callers(self.source, "torch.save", ".save_checkpoint")
        # The first needs float16, the second stage3_gather_16bit_weights_on_model_save: false, the others a hub.
        unreached = {"_save_scaler", "save_model", "_push_from_checkpoint", "_tune_save_checkpoint"}
        assert found - unreached <= OVERRIDDEN


class TestTransformers:
    def test_attention_implementation(self):
        model = tiny_llama()
        assert of_transformers.attention_implementation(model.config) == "sdpa"
        model.set_attn_implementation("eager")
        assert of_transformers.attention_implementation(model.config) == "eager"

    def test_implementations(self):
        kernels = {"": "outer/kernel", "text_config": "inner/kernel"}
        config = transformers.LlavaConfig(attn_implementation=kernels, experts_implementation="experts/kernel")
        assert {*kernels.values(), "experts/kernel"} <= set(of_transformers.implementations(config))
        assert of_transformers.implementations(transformers.LlamaConfig()) == []

    def test_sdpa_attention(self):
        query, key, value = torch.randn(3, 2, 4, 5, 8)
        module = SimpleNamespace(is_causal=False, training=False)
        output, weights = of_transformers.sdpa_attention(module, query, key, value, None)
        scores = (query @ key.transpose(2, 3) / 8**0.5).softmax(dim=-1) @ value
        torch.testing.assert_close(output, scores.transpose(1, 2))
        assert weights is None

    def test_a_variant_of_sdpa_gets_its_masks(self):
        calls = []

        def counted(*arguments, **settings):
            calls.append(arguments[4])
            return of_transformers.sdpa_attention(*arguments, **settings)

        of_transformers.register_sdpa_variant("counted_sdpa", counted)
        ids, mask = torch.tensor([[0, 3, 4], [5, 6, 7]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
        plain, variant = tiny_llama(), tiny_llama()
        variant.set_attn_implementation("counted_sdpa")
        expected, output = (model(input_ids=ids, attention_mask=mask).logits for model in (plain, variant))
        assert torch.equal(output, expected)
        assert len(calls) == plain.config.num_hidden_layers
        assert calls[0].shape == (2, 1, 3, 3)

    def test_model_types(self):
        assert of_transformers.has_causal_lm(transformers.LlamaConfig())
        assert not of_transformers.has_causal_lm(transformers.CLIPTextConfig())
        assert {"llama", "gpt2"} <= set(of_transformers.causal_lm_types())
        assert "t5" in of_transformers.seq2seq_lm_types()
        assert "bert" in of_transformers.masked_lm_types()
        assert "llama" not in [*of_transformers.seq2seq_lm_types(), *of_transformers.masked_lm_types()]
        tagger = transformers.AutoModelForTokenClassification
        assert of_transformers.has_auto_class(tagger, transformers.BertConfig())
        assert not of_transformers.has_auto_class(tagger, transformers.MambaConfig())

    def test_sharded_loading(self):
        assert not of_transformers.loads_sharded()
        config = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
        alive = transformers.integrations.HfDeepSpeedConfig(config)
        assert of_transformers.loads_sharded()
        of_transformers.stop_sharded_loading()
        assert not of_transformers.loads_sharded()
        del alive

    def test_unlogged_loss(self):
        source = inspect.getsource(transformers.Trainer)
        assert "self._tr_loss = torch.tensor" in source
        assert "self._globalstep_last_logged = self.state.global_step" in source
        state = SimpleNamespace(global_step=7)
        trainer = SimpleNamespace(state=state, _tr_loss=torch.tensor(0.0), _globalstep_last_logged=7)
        of_transformers.set_unlogged_loss(trainer, 2, 0.5)
        assert of_transformers.unlogged_loss(trainer) == (2, 0.5)

    def test_the_layers_of_a_cache(self):
        cache = transformers.DynamicCache(config=tiny_llama().config)
        layer_class = load("transformers.cache_utils.DynamicLayer")
        assert [type(layer) for layer in cache.layers] == [layer_class] * 2
        layer = layer_class()
        assert layer.is_initialized is False
        layer.update(torch.zeros(2, 1, 3, 4), torch.ones(2, 1, 3, 4))
        assert layer.is_initialized
        assert layer.get_seq_length() == 3
        assert layer.keys.shape == layer.values.shape == (2, 1, 3, 4)
        layer.batch_select_indices(torch.tensor([1]))
        assert len(layer.keys) == 1

    def test_what_is_known_of_rows_is_not_asked(self):
        """Outside, transformers looks at the mask; inside, it takes our word that rows are not padded, or that they are."""
        model = tiny_llama(layers=1)
        ids, full = torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.ones(2, 3, dtype=torch.int64)
        padded = full.clone()
        padded[0, 0] = 0
        packed = torch.tensor([[0, 1, 0]])
        plain, masked = (model(ids, attention_mask=mask).logits for mask in (full, padded))
        assert not torch.equal(plain[0, 2], masked[0, 2])
        with of_transformers.known_rows(padded=False):
            assert torch.equal(model(ids, attention_mask=padded).logits, plain)
            assert masking_utils.find_packed_sequence_indices(packed) is None
        with of_transformers.known_rows(padded=True):
            assert torch.equal(model(ids, attention_mask=padded).logits, masked)
        assert torch.equal(model(ids, attention_mask=padded).logits, masked)
        assert masking_utils.find_packed_sequence_indices(packed).tolist() == [[0, 0, 1]]


class TestTRL:
    @pytest.mark.skipif(not FUSED, reason="TRL 1.14, the last for Python 3.10, has no fused head")
    def test_the_fused_head(self):
        """It computes every position on this machine, and the label tokens alone inside the block."""
        sizes = []

        model = tiny_llama()
        outputs = ("log_probs", "entropy", "is_top1")
        trl.trainer.utils.add_fused_lm_head(model, outputs=outputs)
        labels = torch.tensor([[-100, -100, 3, 4, -100, -100]])
        chunked = trl.trainer.utils._ChunkedLogProbFunction.apply

        def watched(states, *rest):
            sizes.append(len(states))
            return chunked(states, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trl.trainer.utils._ChunkedLogProbFunction, "apply", watched)
            ids = torch.tensor([[5, 6, 3, 4, 7, 8]])
            arguments = {"input_ids": ids, "labels": labels, of_trl.FUSED_HEAD_ARGUMENT: True}
            everywhere = model(**arguments)
            with of_trl.fused_head_on_label_tokens():
                alone = model(**arguments)
            model(**arguments)
        assert sizes == [5, 2, 5]
        for name in (*outputs, "label_mask"):
            assert getattr(alone, name).shape == (1, 5)
        assert alone.label_mask.tolist() == [[False, True, True, False, False]]
        torch.testing.assert_close(alone.log_probs, everywhere.log_probs)

    @pytest.mark.skipif(not FUSED, reason="TRL 1.14, the last for Python 3.10, has no fused head")
    def test_the_sft_trainer_asks_for_it(self):
        assert of_trl.FUSED_HEAD_ARGUMENT in inspect.getsource(trl.SFTTrainer.compute_loss)

    def test_metrics_and_tokens(self):
        trainer = SimpleNamespace(**{of_trl.TRAINER_METRICS: {"eval": {}}, of_trl.TRAINER_TOKENS: 5})
        of_trl.pending_metrics(trainer, "eval")["accuracy"] = [1.0]
        assert trainer._metrics == {"eval": {"accuracy": [1.0]}}
        of_trl.raise_token_count(trainer, 3)
        assert trainer._total_train_tokens == 5
        of_trl.raise_token_count(trainer, 8)
        assert trainer._total_train_tokens == 8


SHARDED = """
import json
import os
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", DS_ACCELERATOR="cpu")
import deepspeed
from torch import nn
from align.compat import deepspeed as of_deepspeed
of_deepspeed.disable_deepspeed_shared_memory()
deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
with deepspeed.zero.Init(config_dict_or_path={"zero_optimization": {"stage": 3}, "train_batch_size": 1}):
    weight = nn.Linear(3, 5).weight
found = [of_deepspeed.is_sharded(weight), list(of_deepspeed.full_shape(weight)), of_deepspeed.local_shard(weight).numel(), weight.numel()]
found.append(deepspeed.comm.comm.cdb.shm_comm_op is None)
print(json.dumps(found))
"""


class TestDeepSpeed:
    def test_a_sharded_parameter(self, tmp_path):
        done = ranks.run(ranks.execute, SHARDED, ranks=1, log=tmp_path / "rank")
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads(done.stdout.splitlines()[-1]) == [True, [5, 3], 15, 0, True]

    def test_a_plain_parameter(self):
        weight = nn.Linear(3, 5).weight
        assert not of_deepspeed.is_sharded(weight)
        assert of_deepspeed.full_shape(weight) == (5, 3)
        assert torch.equal(of_deepspeed.local_shard(weight), weight)

    def test_the_names_of_its_shared_memory(self):
        prefix = of_deepspeed.DEEPSPEED_SHARED_MEMORY_FILES.removesuffix("_*")
        package = Path(importlib.util.find_spec("deepspeed").origin).parent
        assert prefix in (package / "ops" / "csrc" / "cpu" / "comm" / "shm.cpp").read_text(encoding="utf-8")


def test_a_tuner_of_ours_is_known_to_peft():
    from peft import mapping

    from align.models.bottleneck import BottleneckConfig, BottleneckLayer, BottleneckModel

    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["BOTTLENECK"] is BottleneckConfig
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING["BOTTLENECK"] is BottleneckModel
    model = tiny_llama()
    get_peft_model(model, BottleneckConfig(target_modules=["mlp.down_proj"], task_type="CAUSAL_LM"))
    assert all(isinstance(layer.mlp.down_proj, BottleneckLayer) for layer in model.model.layers)


def test_the_active_adapter():
    model = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    settings = of_peft.active_adapter_config(model)
    assert settings.is_prompt_learning
    assert settings.num_virtual_tokens == 3


def test_the_prefix_of_an_encoder_decoder_is_in_the_cache_while_it_generates(tmp_path):
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(save_tiny_pair_model(tmp_path, "bart")).eval()
    torch.manual_seed(0)
    model = get_peft_model(model, PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)).eval()
    model.prompt_encoder["default"].embedding.weight.data.mul_(5)
    ids = torch.tensor([[5, 6, 2]])
    with of_peft.prefix_in_cache(model):
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6)
    best = model(input_ids=ids, decoder_input_ids=found[:, :-1]).logits.argmax(-1)
    assert found[0, 1:].tolist() == best[0].tolist()


def test_ia3_merges_beside_a_head_of_several_layers(tmp_path):
    save_tiny_pair_model(tmp_path, "bart")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    model = get_peft_model(model, IA3Config(task_type="SEQ_CLS", modules_to_save=["classification_head"])).eval()
    for name, weight in model.named_parameters():
        if "ia3_" in name:
            weight.data.mul_(1.5)
    ids = torch.tensor([[5, 6, 2]])
    before = model(input_ids=ids).logits
    merged = of_peft.merge_and_unload(model)
    torch.testing.assert_close(merged(input_ids=ids).logits, before)
    assert not hasattr(merged.classification_head, "weight")


def test_bitsandbytes_layers():
    layers = pytest.importorskip("bitsandbytes").nn
    layer = layers.Linear4bit(4, 4)
    assert hasattr(layer, "support_avx512bf16_for_cpu")
    of_others.keep_differentiable_kernel(layer)
    assert layer.support_avx512bf16_for_cpu is False
    plain = nn.Linear(4, 4)
    of_others.keep_differentiable_kernel(plain)
    assert not hasattr(plain, "support_avx512bf16_for_cpu")


def test_sacrebleu_statistics():
    metrics = pytest.importorskip("sacrebleu.metrics")
    predictions, references = ["a b c d e", "a b c d f g"], ["a b c d e", "a b c x f g"]
    for metric in (metrics.BLEU(force=True), metrics.CHRF()):
        rows = torch.tensor(of_others.bleu_statistics(metric, predictions, references))
        score = of_others.bleu_score(metric, rows.sum(dim=0).int().tolist())
        assert score == pytest.approx(metric.corpus_score(predictions, [references]).score)


def test_hub_can_be_set_off():
    import datasets
    from huggingface_hub import constants, is_offline_mode

    was = of_others.hub_is_off()
    try:
        for off in (False, True):
            of_others.set_hub_off(off)
            assert of_others.hub_is_off() is is_offline_mode() is datasets.config.HF_HUB_OFFLINE is off
    finally:
        of_others.set_hub_off(was)
    assert of_others.hub_address() == constants.ENDPOINT


def private_names(tree: ast.Module) -> set[str]:
    """Underscore attributes that a module reaches on anything but what its own classes define."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            for name in ast.walk(target):
                if isinstance(name, ast.Attribute) and isinstance(name.value, ast.Name) and name.value.id == "self":
                    own.add(name.attr)
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in used - own if name.startswith("_") and not name.endswith("__")}


def imported_private_names(tree: ast.Module) -> set[str]:
    """Underscore names that a module imports from another package."""
    return {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name.startswith("_")
    }


def overrides(tree: ast.Module) -> set[str]:
    """Underscore methods that are called on `super()`."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value) == "super()"
        and node.attr.startswith("_")
        and not node.attr.endswith("__")
    }


def test_chat_template_compiler():
    names = {}
    exec(of_transformers.chat_template_compiler(date(2024, 7, 26)), names)
    text = "{% set ns = namespace(a=1) %}{% generation %}{{ ns.a }}{% endgeneration %}{{ [{'é': 1}] | tojson(ensure_ascii=true) }}"
    template = names["compile_template"](text)
    assert template.render() == '1[{"\\u00e9": 1}]'
    assert {"raise_exception", "namespace"} <= template.environment.globals.keys()
    assert names["compile_template"]("{{ strftime_now('%d %b %Y') }}").render() == "26 Jul 2024"


def test_apply_chat_template():
    from transformers.utils import chat_template_utils

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), chat_template="own")
    before = chat_template_utils._compile_jinja_template
    asked = []

    def compiled(text):
        asked.append(text)
        return jinja2.Template("{{ messages[0].content }}{{ add_generation_prompt }}")

    messages = [{"role": "user", "content": "hello"}]
    text = of_transformers.apply_chat_template(tokenizer, messages, compiled, add_generation_prompt=True)
    assert text == "helloTrue"
    assert asked == ["own"]
    assert chat_template_utils._compile_jinja_template is before


def test_config_of():
    config, causal = transformers.Qwen3_5Config(), transformers.AutoModelForCausalLM
    assert of_transformers.config_of(of_transformers.model_class(causal, config), config) is config.text_config
    with torch.device("meta"):
        assert type(causal.from_config(config).config) is type(config.text_config)
    plain = transformers.LlamaConfig()
    assert of_transformers.config_of(of_transformers.model_class(causal, plain), plain) is plain


def test_write_unchecked(tmp_path):
    config = transformers.GenerationConfig(do_sample=False, temperature=0.9)
    with pytest.raises(ValueError, match="temperature"):
        config.save_pretrained(tmp_path)
    of_transformers.write_unchecked(config)
    config.save_pretrained(tmp_path)
    assert transformers.GenerationConfig.from_pretrained(tmp_path).temperature == 0.9


OVERRIDDEN = {method for methods in compat.OVERRIDDEN.values() for method in methods}


def test_the_walk_sees_private_names():
    tree = ast.parse(
        "from a import _e\n"
        "class A:\n"
        "    def f(self):\n"
        "        self._a = 1\n"
        "        self._a + self._b + x._c\n"
        "    def _d(self):\n"
        "        self._d, super()._d()\n"
    )
    assert private_names(tree) == {"_b", "_c"}
    assert imported_private_names(tree) == {"_e"}
    assert overrides(tree) == {"_d"}


def test_private_names_of_others_are_reached_through_compat():
    wrong = {}
    for path in sorted([*ROOT.glob("align/**/*.py"), *ROOT.glob("reward_models/*.py")]):
        if path.parent == ROOT / "align" / "compat":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        allowed = {*OVERRIDDEN, "_exit"}  # the latter of the standard library's os
        if found := (private_names(tree) | imported_private_names(tree) | overrides(tree)) - allowed:
            wrong[str(path.relative_to(ROOT))] = found
    assert not wrong


def test_is_linear_attention_and_keeps_exact_cache():
    """The classes of layers and of models that these ask are there, and models without a recurrent state are known."""
    from transformers import AutoConfig, DynamicCache

    lfm2 = AutoConfig.for_model("lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"])
    assert list(map(of_transformers.is_linear_attention, DynamicCache(config=lfm2).layers)) == [True, False]
    exact = {name: of_transformers.keeps_exact_cache(AutoConfig.for_model(name)) for name in ("llama", "rwkv", "lfm2")}
    assert exact == {"llama": True, "rwkv": False, "lfm2": True}
    assert [of_transformers.keeps_state(config) for config in (tiny_llama().config, lfm2)] == [False, True]


def test_has_fixed_step():
    classes = (transformers.LlamaForCausalLM, transformers.RwkvForCausalLM)
    assert [of_transformers.has_fixed_step(each) for each in classes] == [True, False]


def test_router_settings():
    """Granite's configurations name the number of experts otherwise than TRL; its dense hybrids have a router's settings."""
    config = transformers.GraniteMoeHybridConfig(num_local_experts=8)
    before = config.to_dict()
    assert of_trl.router_settings(config, False) == {"router_aux_loss_coef": 0.0}
    assert of_trl.router_settings(config, True) == {}
    assert config.num_experts == 8
    assert config.to_dict() == before
    assert of_trl.router_settings(transformers.LlamaConfig(), False) == {}
    assert "router_aux_loss_coef" in trl.SFTConfig.__dataclass_fields__


def test_in_place_changes():
    tensor = torch.zeros(2)
    before = of_others.in_place_changes(tensor)
    tensor.add_(1)
    assert of_others.in_place_changes(tensor) == before + 1
