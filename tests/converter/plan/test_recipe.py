"""Recipes: what every key means, and what is refused before anything is read."""

import pytest

from lfmq.converter.plan.builtin import DEFAULT_RECIPE, builtin_recipes
from lfmq.converter.plan.recipe import load_recipe, parse_recipe
from lfmq.formats.plan import EXPERT_ROLES, SHARED_ROLES, Role
from lfmq.quant.errors import RecipeError
from lfmq.quant.types import Scheme


def rules(text):
    return parse_recipe(text, "mine", "mine.toml").rules


def rule(text):
    (only,) = rules(f"[[rule]]\n{text}")
    return only


def test_the_built_in_recipes():
    assert set(builtin_recipes()) >= {"int4", "int4-all", "int8", "q4_k_m", "q5_k_m", "q6_k"}
    assert DEFAULT_RECIPE == "int4"
    for name in builtin_recipes():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert "description" in recipe.text


def test_a_file_is_named_after_its_stem(tmp_path):
    path = tmp_path / "careful.toml"
    path.write_text("[[rule]]\nbits = 8\n")
    recipe = load_recipe(str(path))
    assert (recipe.name, recipe.text) == ("careful", path.read_text())


def test_an_empty_condition_matches_all():
    assert rule("bits = 4").roles == {*EXPERT_ROLES, *SHARED_ROLES}


@pytest.mark.parametrize(
    ("text", "storage"),
    [
        ("bits = 4", Scheme(4, 32)),
        ("bits = 8\ngroup = 128", Scheme(8, 128)),
        ('bits = 4\ngrid = "symmetric"', Scheme(4)),
        ('bits = 4\ngroup = 64\ngrid = "affine_bias"', Scheme(4, 64, "affine_bias")),
        ('bits = 8\ngrid = "affine_zero_point"', Scheme(8, 32, "affine_zero_point")),
        ('bits = 5\ngroup = 64\ngrid = "affine_bias"', Scheme(5, 64, "affine_bias")),
        ('bits = 4\ngrid = "kquant"', Scheme(4, 32, "kquant")),
        ('bits = 6\ngrid = "kquant"', Scheme(6, 16, "kquant")),
        # names that grids had before
        ('bits = 4\ngrid = "affine"', Scheme(4, 32, "affine_bias")),
        ('bits = 4\ngrid = "asymmetric"', Scheme(4, 32, "affine_zero_point")),
        ('bits = 5\ngrid = "superblock"', Scheme(5, 32, "kquant")),
        ('float = "bfloat16"', "bfloat16"),
    ],
)
def test_storage(text, storage):
    assert rule(text).storage == storage


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("3", {3}),
        ('"2-5"', {2, 3, 4, 5}),
        ('[0, "4-5", "7"]', {0, 4, 5, 7}),
    ],
)
def test_layers_and_experts_are_numbers_or_ranges(text, numbers):
    assert rule(f"bits = 4\nlayers = {text}").layers == numbers
    assert rule(f"bits = 4\nexperts = {text}").experts == numbers


def test_more_bits_stands_for_layers_that_a_model_decides():
    found = rule('bits = 4\nlayers = "more_bits"')
    assert found.more_bits
    assert not found.layers


def test_roles_and_sets_of_roles():
    assert rule('bits = 4\nroles = ["experts"]').roles == set(EXPERT_ROLES)
    assert rule('bits = 4\nroles = "conv"').roles == {Role.CONV}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits = 3", "bits is 3, expected one of"),
        ("bits = 4.0", "bits is 4.0"),
        ("bits = true", "bits is True"),
        ('bits = "4"', "bits is '4'"),
        ("bits = [4]", "bits is"),
        ("group = 32", "bits is None"),
        ("bits = 4\ngroup = 16", "group is 16"),
        ('bits = 4\ngrid = "other"', "grid is 'other'"),
        ('float = "float64"', "float is 'float64'"),
        ("float = [1]", "float is"),
        ('float = "float16"\nbits = 4', "float excludes bits"),
        ("bits = 4\nlayers = -1", "layers has -1"),
        ('bits = 4\nlayers = "5-2"', "layers has '5-2'"),
        ('bits = 4\nlayers = "0-99999999999999"', "layers has"),
        ("bits = 4\nlayers = [true]", "layers has True"),
        ("bits = 4\nexperts = 1.5", "experts has 1.5"),
        ("bits = 4\nexperts = [[1]]", "experts has"),
        ("bits = 4\nnames = 3", "names is 3, expected a list of str"),
        ("bits = 4\nroles = [1]", "roles is"),
        ('bits = 4\nlayers = ["more_bits"]', "layers has 'more_bits'"),
        ('bits = 4\nroles = "norm"', "role 'norm' is float in every build"),
        ('bits = 4\nroles = "all"', "unknown role 'all'; known: experts"),
        ("bits = 4\nlayer = 1", "rule 1: unknown key 'layer'; known: bits"),
    ],
    ids=lambda v: v[:30],
)
def test_illegal_values(text, message):
    with pytest.raises(RecipeError, match=r"^mine\.toml: rule 1: ") as caught:
        rule(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "rule = 3", "rule = [3]", "[rule]\nbits = 4", "x = 1", "[[rule", "a = " + "[" * 100_000],
    ids=lambda v: v[:20],
)
def test_what_is_no_recipe(text):
    with pytest.raises(RecipeError, match=r"^mine\.toml: "):
        rules(text)


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_a_file_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "mine.toml"
    path.mkdir() if content is None else path.write_bytes(content)
    known = (
        r"neither a built-in recipe \(int4, int4-all, int4-fast, int4-mixed, int8, q4_k_m, .*\)"
    )
    with pytest.raises(RecipeError, match=known):
        load_recipe(str(path))
