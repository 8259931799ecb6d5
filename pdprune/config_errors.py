"""Says in one line what is wrong with a configuration, from the trees of text in which jsonargparse says it."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jsonargparse
from omegaconf.errors import OmegaConfBaseException

_ANY_POSITIONAL, _ANY_KEYWORD = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD

_NOT_ACCEPTED = re.compile(
    r"Option '(?P<option>[^']+)' is not accepted"
    r"|Group '(?P<group>[^']+)' does not accept option '(?P<member>[^']+)'"
    r"|Subcommand '\w+' does not accept option '(?P<key>[^']+)'"
    r"|unrecognized arguments: (--)?(?P<flag>[^\s=]+)[ =]?(?P<value>\S*)"
)

_NOISE = re.compile(
    r"^\s*(Does not validate against .*|Subtypes: .*|Errors:|Given value.*|- Expected a <class 'NoneType'>)$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Given:
    """What a command line consists of, to name the key and the value that are wrong in it."""

    command: str | None
    """For instance "fit"."""
    known_keys: Sequence[str]
    """What the command accepts, for instance "trainer.max_steps"."""
    configs: Sequence[Any]
    """The content of its config files, in order."""


def explain(error: Exception, given: Given) -> str:
    """One line that names the key, the value, and what was expected.

    Args:
        error: what parsing a command line and its config files raised.
        given: what was parsed.
    """
    text = str(error)
    if isinstance(error, OmegaConfBaseException):
        return _explain_interpolation(text, given.command)
    explanations = (explain_one(text, given) for explain_one in _EXPLANATIONS)
    message = next((found for found in explanations if found is not None), _NOISE.sub("", text))
    message = message.replace(f" {given.command}.", " ")
    return " ".join(message.split())


def _explain_interpolation(text: str, command: str | None) -> str:
    reason = text.splitlines()[0]
    key = re.search(r"full_key: (\S+)", text)
    if unknown := re.search(r"\(resolved to '([^']+)'\)", reason):
        reason = f"${{{unknown[1]}}} names no key of the config"
    message = f"{key[1]}: {reason}" if key else reason
    return message.replace(f"{command}.", "")


def _explain_not_accepted(text: str, given: Given) -> str | None:
    found = _NOT_ACCEPTED.search(text)
    if found is None:
        return None
    parents = _keys_before(text, found.start())
    in_group = found["group"] and f"{found['group']}.{found['member']}"
    name = in_group or found["option"] or found["key"] or found["flag"]
    key = ".".join([*parents, name])
    value = found["value"] or _given_value(text, name) or _value_in_configs(given.configs, key)
    owner = re.findall(r"Problem with given class_path '([^']+)'", text[: found.start()])
    names = _parameters_of(owner[-1], name.split(".")[:-1]) if owner else given.known_keys
    return f"{key}{f' = {value}' if value else ''}: there is no such key; {_suggest(name, names)}"


def _explain_import(text: str, given: Given) -> str | None:
    found = re.search(
        r"Problem with given class_path '([^']+)':\s+"
        r"(No module named .*|module .* has no attribute .*|.*[Ii]mport(?!ance).*)",  # a key may be `importances`
        text,
    )
    if found is None:
        return None
    key = ".".join(_keys_before(text, found.start()))
    return f"{key}: class {found[1]} can't be imported ({found[2].strip()})"


def _explain_required(text: str, given: Given) -> str | None:
    found = re.search(r"the following arguments are required: (.*)", text)
    if found is None:
        return None
    parents = _keys_before(text, found.start())
    missing = ", ".join(".".join([*parents, name.strip()]) for name in found[1].split(","))
    return f" {missing}: required, but not given; set it in a --config file or with a flag"


def _explain_unexpected_value(text: str, given: Given) -> str | None:
    types = [
        _readable_type(found) for found in re.findall(r"Expected (?:an? )?(.+?)(?:\. Got value: .*)?$", text, re.M)
    ]
    expected = list(dict.fromkeys(name for name in types if name))
    value = re.search(r"(?:Got value|Given value|dot import path string): (.*)", text)
    if not expected or value is None:
        return None
    return f"{'.'.join(_keys_before(text, value.start()))}: expected {' or '.join(expected)}, got '{value[1]}'"


def _explain_refusal(text: str, given: Given) -> str | None:
    """What a constructor itself found wrong stands bare among the errors."""
    found = re.search(r"Errors:\s+- (?!Expected|Problem)(.*)", text)
    return found[1] if found else None


_EXPLANATIONS = (
    _explain_not_accepted,
    _explain_import,
    _explain_required,
    _explain_refusal,
    _explain_unexpected_value,
)


def _keys_before(text: str, end: int) -> list[str]:
    """The keys that lead to position `end` of the tree, outermost first."""
    return list(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', text[:end])))


def _given_value(text: str, name: str) -> str:
    """The value given under `name` in a flag or in the dict that jsonargparse quotes."""
    leaf = re.escape(name.rsplit(".", 1)[-1])
    found = re.search(rf"'{leaf}': ('[^']*'|[^,}}\]]+)|key='(?:[^']*\.)?{leaf}', val='([^']*)'", text)
    return (found[1] or found[2] or "") if found else ""


def _value_in_configs(configs: Sequence[Any], key: str) -> str:
    """What the last config file with this key sets it to."""
    value = ""
    for config in configs:
        for part in key.split("."):
            config = config.get(part) if isinstance(config, dict) else None
        value = value if config is None else str(config)
    return value


def _readable_type(found: str) -> str:
    """`<class 'int'>` as `int`, a Literal as its values; empty for what is no help to a reader."""
    if found.startswith("dot import path"):
        return "a class path"
    if found.startswith("path but") or "NoneType" in found:
        return ""
    if literal := re.fullmatch(r"typing\.Literal\[(.*)\]", found):
        return f"one of {literal[1]}"
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", found)


def _parameters_of(class_path: str, path: list[str]) -> list[str]:
    """Names of the constructor arguments of `class_path`, or of the dataclass that `path` leads to in it."""
    try:
        module, _, name = class_path.rpartition(".")
        found = getattr(importlib.import_module(module), name)
        for step in path:
            found = typing.get_type_hints(found.__init__)[step]
        kinds = {name: parameter.kind for name, parameter in inspect.signature(found).parameters.items()}
        left_out = (_ANY_POSITIONAL, _ANY_KEYWORD)
        names = [name for name, kind in kinds.items() if name != "self" and kind not in left_out]
        # Arguments that are handed on by `**` are another constructor's, which jsonargparse has looked up.
        handed_on = jsonargparse.ArgumentParser().add_class_arguments(found) if _ANY_KEYWORD in kinds.values() else []
        return list(dict.fromkeys([*names, *(key.split(".")[0] for key in handed_on)]))
    except (ImportError, AttributeError, KeyError, NameError, TypeError, ValueError):
        return []  # only the suggestion is lost


def _suggest(name: str, names: Sequence[str]) -> str:
    tops = list(dict.fromkeys(known.split(".")[0] for known in names))
    top, last = name.split(".")[0], name.rsplit(".", 1)[-1]
    candidates, wanted = (names, name) if top in tops else (tops, top if "." in name else last)
    close = difflib.get_close_matches(wanted, candidates, n=1) or difflib.get_close_matches(last, names, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"there are {', '.join(tops)}" if tops else "see --help"
