"""One YAML file, checked key by key."""

import pytest
import yaml

from prefkern import checks, losses
from prefkern.granularity import Adaptive, Boundaries, Static
from prefkern.training.config import Config, LoraConfig, load_config
from prefkern.training.errors import ConfigError
from prefkern.training.fields import describe_loss
from prefkern.training.reference import resolve_reference
from prefkern.training.resolve import resolve_loss, resolve_trainer, resolved, training_arguments

MINIMAL = {"model": {"name": "m"}, "data": {"train": "d"}, "loss": {"name": "autoregressive_dpo"}}


def resolve(*overrides: str, base: dict = MINIMAL) -> Config:
    config = Config.from_dict(base, overrides)
    loss = resolve_loss(config.loss)
    resolve_reference(config.reference, loss, adapters=config.model.lora is not None)
    return resolved(config, loss, resolve_trainer(config, loss))


def test_overrides_reach_every_depth():
    config = resolve(
        "model.lora.r=4", "loss.granularity={adaptive: 8}", "trainer.learning_rate=1e-5", "run.output=there"
    )
    assert config.model.lora == LoraConfig(r=4)
    assert config.loss["granularity"] == {"adaptive": {"m": 8, "rule": "A"}}
    assert config.trainer["learning_rate"] == 1e-5, "YAML reads 1e-5 as text"
    assert config.run.output == "there"
    assert MINIMAL["loss"] == {"name": "autoregressive_dpo"}, "the mapping given is not changed"


@pytest.mark.parametrize("overrides", [
    (), ("loss.granularity=null",), ("loss.granularity=boundaries",), ("loss.granularity.static=3", "model.lora={}"),
    ("loss={name: nll}", "trainer={report_to: none, optim: sgd, eval_strategy: no}"),
], ids=str)  # fmt: skip
def test_the_resolved_configuration_resolves_to_itself(tmp_path, overrides):
    if overrides and overrides[0].startswith("loss={"):
        config = resolve(*overrides[2:], base={**MINIMAL, "loss": {"name": "nll"}})
    else:
        config = resolve(*overrides)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    again = load_config(path)
    assert again == config
    loss = resolve_loss(again.loss)
    assert resolved(again, loss, resolve_trainer(again, loss)) == config
    training_arguments(config.trainer, tmp_path)


@pytest.mark.parametrize("given, expected", [
    ("{static: 3}", Static(3)), ("{adaptive: 4}", Adaptive(4)), ("{adaptive: {m: 4, rule: B}}", Adaptive(4, "B")),
    ("boundaries", Boundaries()), ("boundaries: [[1, 2], []]", Boundaries(((1, 2), ()))), ("null", None),
])  # fmt: skip
def test_granularity(given, expected):
    assert resolve_loss({"name": "autoregressive_dpo", "granularity": yaml.safe_load(given)}).granularity == expected


@pytest.mark.parametrize("name", losses.names())
def test_every_loss_is_written_and_read_back(name):
    for loss in checks.instances(name):
        section = yaml.safe_load(yaml.safe_dump(describe_loss(loss)))
        assert resolve_loss(section) == loss
        assert section.keys() == {"name", *losses.options(name)}, "every field is spelled out"


def test_losses_within_a_loss():
    section = yaml.safe_load("""
        name: combination
        parts: [{weight: 1, name: dpo, beta: 0.3}, {weight: 1e-1, name: autoregressive_dpo, granularity: {adaptive: 2}},
                {weight: 0.2, name: nll}]
    """)
    loss = resolve_loss(section)
    segments = losses.AutoregressiveDPO(granularity=Adaptive(2))
    assert loss == losses.Combination(parts=((1.0, losses.DPO(beta=0.3)), (0.1, segments), (0.2, losses.NLL())))
    assert resolve_loss(yaml.safe_load(yaml.safe_dump(describe_loss(loss)))) == loss


def test_a_loss_of_a_loss():
    plain, own = (resolve_loss({"name": "adadpo", "base": b}) for b in ("simpo", {"name": "simpo", "gamma": 0.3}))
    assert plain == losses.get("adadpo", base=losses.SimPO())
    assert own == losses.get("adadpo", base=losses.SimPO(gamma=0.3))
    assert describe_loss(own)["base"]["gamma"] == 0.3
    with pytest.raises(ConfigError, match="unknown loss.base.name='simppo': did you mean 'simpo'?"):
        resolve_loss({"name": "adadpo", "base": "simppo"})
    with pytest.raises(ConfigError, match="loss.base=3 should be a loss: its name, or {name: dpo, beta: 0.1}"):
        resolve_loss({"name": "adadpo", "base": 3})


def test_a_number_may_stand_for_an_object():
    one, other = (resolve_loss({"name": "anchored_listwise", "tau": tau}) for tau in (0.5, {"fixed": 0.5}))
    assert one == other != resolve_loss({"name": "anchored_listwise"})
    assert describe_loss(one)["tau"] == 0.5
    warm = resolve_loss({"name": "anchored_listwise", "tau": {"smooth_hybrid": {"tau": "5e-1"}}, "targets": "kde"})
    assert describe_loss(warm)["tau"]["smooth_hybrid"]["tau"] == 0.5, "YAML reads 5e-1 as text"


@pytest.mark.parametrize("section, message", [
    ("{name: combination, parts: dpo}", "loss.parts='dpo' should be a list of losses: write loss.parts: [{weight: 1,"),
    ("{name: combination, parts: [{name: dpo}]}", "loss.parts[0]={'name': 'dpo'} should be a loss with a weight"),
    ("{name: combination, parts: [{weight: 1, name: dppo}]}", "unknown loss.parts[0].name='dppo': did you mean 'dpo'?"),
    ("{name: combination, parts: [{weight: 1, name: dpo, bta: 1}]}",
     "unknown key 'loss.parts[0].bta': did you mean 'beta'?"),
    ("{name: combination, parts: [{weight: x, name: dpo}]}", "loss.parts[0].weight='x' should be a number, not text"),
    ("{name: combination, parts: [{weight: 1, name: dpo, beta: -1}]}", "the loss section is wrong: dpo: beta=-1 must"),
    ("{name: anchored_listwise, tau: hot}", "unknown loss.tau 'hot': known: "),
    ("{name: anchored_listwise, tau: true}", "loss.tau=True should name exactly one of its kinds: write a number, "),
    ("{name: anchored_listwise, targets: {given: 3}}", "loss.targets.given=3 takes no value: write loss.targets=given"),
    ("{name: anchored_listwise, targets: {kde: {width: 3}}}", "unknown key 'loss.targets.kde.width': did you mean"),
    ("{name: anchored_listwise, targets: {softmax: -1}}", "Softmax: beta_r=-1 must be a number in (0, 1000]"),
])  # fmt: skip
def test_errors_within_a_loss(section, message):
    with pytest.raises(ConfigError) as error:
        resolve_loss(yaml.safe_load(section))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_output_is_named_after_the_file(tmp_path):
    path = tmp_path / "first_try.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    assert load_config(path).run.output == "runs/first_try"
    assert load_config(path, ["run.output=x"]).run.output == "x"


def test_no_in_yaml_is_a_word_where_words_are_wanted():
    config = Config.from_dict(
        {**MINIMAL, "trainer": yaml.safe_load("{save_strategy: no, eval_strategy: no, bf16: no}")}
    )
    options = resolve_trainer(config, resolve_loss(config.loss))
    assert (options["save_strategy"], options["eval_strategy"], options["bf16"]) == ("no", "no", False)


@pytest.mark.parametrize("override, message", [
    ("modle.name=x", "unknown key 'modle': did you mean 'model'?"),
    ("model.nam=x", "unknown key 'model.nam': did you mean 'name'?"),
    ("model.lora.rank=3", "unknown key 'model.lora.rank': known: alpha, dropout, modules_to_save, r, rslora, target_"),
    ("loss.bta=3", "unknown key 'loss.bta': did you mean 'beta'?"),
    ("trainer.learning_rat=1", "unknown key 'trainer.learning_rat': did you mean 'learning_rate'?"),
    ("loss.name=dppo", "unknown loss.name='dppo': did you mean 'dpo'?"),
    ("loss.name=null", "loss.name is missing: choose one of"),
    ("model.name=null", "model.name=None should be text, not null"),
    ("model.gradient_checkpointing=3", "model.gradient_checkpointing=3 should be true or false, not a whole number"),
    ("model.dtype=fp8", "model.dtype='fp8' should be 'float32' or 'bfloat16' or 'float16' or 'auto', not text"),
    ("model.head.temperature=0", "model.head.temperature=0 should be positive and finite"),
    ("data.max_length=many", "data.max_length='many' should be a whole number or null, not text"),
    ("data.max_length=0", "data.max_length=0 should be at least 1, or null for no limit"),
    ("data.columns.prompt=3", "data.columns.prompt=3 should be text, not a whole number"),
    ("trainer.learning_rate=fast", "trainer.learning_rate='fast' should be a number, not text"),
    ("trainer.max_steps=1.5", "trainer.max_steps=1.5 should be a whole number, not a number"),
    ("trainer.lr_scheduler_type=cosin", "lr_scheduler_type='cosin' is not one of its values: did you mean 'cosine'?"),
    ("trainer.output_dir=x", "trainer.output_dir is not yours to set: use run.output"),
    ("loss.beta=x", "loss.beta='x' should be a number, not text"),
    ("loss.beta=-1", "autoregressive_dpo: beta=-1 must be a number in (0, 100]"),
    ("loss.granularity={adaptiv: 3}", "unknown loss.granularity 'adaptiv': did you mean 'adaptive'?"),
    ("loss.granularity={adaptive: 3, static: 2}",
     "should name exactly one of its kinds: write {static: k}, {adaptive: m}, boundaries or null"),
    ("loss.granularity=static", "loss.granularity.static.k is missing: write {static: k}, {adaptive: m}, boundaries"),
    ("loss.granularity.adaptive={n: 3}", "unknown key 'loss.granularity.adaptive.n': "),
    ("loss.granularity.adaptive={m: 3, rule: C}", "loss.granularity.adaptive.rule='C' should be 'A' or 'B', not text"),
    ("loss.granularity.static=x", "loss.granularity.static.k='x' should be a whole number, not text"),
    ("loss.granularity=3", "loss.granularity=3 should name exactly one of its kinds"),
    ("loss.granularity.adaptive=0", "m=0 must be an integer of at least 1"),
    ("reference.mode=none", "compares with a reference: set reference.mode to frozen or precomputed"),
    ("loss.beta", "'loss.beta' is not an override: write section.key=value"),
    ("beta=3", "'beta=3' is not an override: write section.key=value"),
    ("model.name.x=3", "cannot set 'model.name.x': model.name='m' is not a mapping"),
    ("loss.beta=[", "the value of 'loss.beta=[' is not valid YAML"),
])  # fmt: skip
def test_errors_name_key_value_and_mend(override, message):
    with pytest.raises(ConfigError) as error:
        resolve(override)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_reference_for_a_loss_without_one_is_an_error():
    with pytest.raises(ConfigError, match="loss 'simpo' uses no reference: remove reference.mode='frozen'"):
        resolve("reference.mode=frozen", base={**MINIMAL, "loss": {"name": "simpo"}})


@pytest.mark.parametrize("text, message", [
    (None, "cannot read the configuration"),
    ("a: [", "line 1 is not valid YAML"),
    ("- a", "should hold a mapping with the sections model, data and loss"),
    ("model: {name: m}\nloss: {name: dpo}", "data is missing: it must be set"),
    ("model: {}\ndata: {train: d}\nloss: {name: dpo}", "model.name is missing: it must be set"),
    ("model: m\ndata: {train: d}\nloss: {name: dpo}", "model='m' should be a mapping of keys to values, not text"),
], ids=["absent", "broken", "list", "section", "key", "text"])  # fmt: skip
def test_file_errors(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert message in str(error.value)
