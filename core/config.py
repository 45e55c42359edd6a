"""Settings. A dataclass field is a command-line flag and a TOML key at once, documented where it is declared.

Precedence: defaults < the saved run (of --resume and --init-from) < `--config file.toml` < flags. An unknown key or
flag is an error with a did-you-mean. `ModelConfig` is the shape of both twins and needs no torch, so that the packed
engine can read it; training's own settings are declared in training/settings.py, others where they are used.
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
import sys
import tomllib
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from core.files import UserError

TWINS = ("gpt", "bitgpt")
OF_TRITS = ("absmean", "absmedian", "sign")  # values of weight_quant that give -1, 0 and 1 alone
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MOST_THREADS = 1024  # torch falls over some tens of thousands


def setting(default: Any, help: str, *, alias: str = "", choices: tuple[str, ...] = (), path: bool = False,
            low: float = -math.inf, high: float = math.inf, above: float = -math.inf, below: float = math.inf) -> Any:
    """A dataclass field with the help text of its flag, an optional second flag and limits: low <= value <= high
    and above < value < below. path: a leading ~ is expanded, where the shell did not."""
    return dataclasses.field(default=default, metadata={
        "help": help, "alias": alias, "choices": choices, "path": path,
        "low": low, "high": high, "above": above, "below": below})


@dataclasses.dataclass
class ModelConfig:
    """The shape of the network, one and the same for both twins. `resolved` fills in what is 0."""

    n_layer: int = setting(4, "transformer blocks", low=1, high=1000)
    n_head: int = setting(4, "attention heads", low=1, high=2**16)
    n_kv_head: int = setting(0, "key and value heads, each shared by n_head / n_kv_head heads (0: n_head)", low=0,
                             high=2**16)
    n_embd: int = setting(128, "width of the residual stream", low=1, high=2**20)
    n_ff: int = setting(0, "width inside the MLP (0: 8/3 of n_embd, rounded to blocks of 256 or 64)", low=0,
                        high=2**22)
    block_size: int = setting(64, "context length in tokens", low=1, high=2**20)
    vocab_size: int = setting(0, "size of the vocabulary (0: the tokenizer's own; with bpe: how many to train)", low=0,
                              high=2**24)
    act: str = setting("silu", "activation of the gated MLP", choices=("silu", "relu2"))
    norm: str = setting("sub", "where RMSNorms are: before attention, MLP and (sub_norm) their output projections; or "
                        "an inner one in every linear layer", choices=("sub", "inner"))
    sub_norm: bool = setting(True, "RMSNorm before the output projections of attention and MLP")
    tie_embeddings: bool = setting(True, "the head shares the embedding's weights")
    qk_norm: bool = setting(False, "RMSNorm on queries and keys, per head")
    weight_quant: str = setting("absmean", "bitgpt: its weights are trits by the mean or the median of |W|, one bit "
                                "(sign) or two", choices=(*OF_TRITS, "int2"))
    activation_quant: str = setting("int8", "bitgpt: what is made of a linear layer's input; clamp8: int8 without "
                                    "the rounding", choices=("int8", "int4", "clamp8", "none"))
    scale: str = setting("tensor", "bitgpt: one scale for a weight tensor, or for each of its rows",
                         choices=("tensor", "row"))
    dropout: float = setting(0.0, "dropout rate", alias="d", low=0, below=1)
    rope_theta: float = setting(10000.0, "base of the rotary frequencies", above=0, high=1e30)
    norm_eps: float = setting(1e-5, "epsilon of every RMSNorm", above=0)

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def has_sub_norms(self) -> bool:
        """--norm inner has its norms elsewhere."""
        return self.sub_norm and self.norm == "sub"

    def resolved(self) -> "ModelConfig":
        """A copy with n_kv_head and n_ff filled in. Raises UserError where the sizes do not fit together."""
        config = dataclasses.replace(self, n_kv_head=self.n_kv_head or self.n_head)
        if config.n_embd % config.n_head:
            even = 2 * config.n_head
            raise UserError(f"n_embd {config.n_embd} is not divisible by n_head {config.n_head}. "
                            f"Try --n-embd {even * max(1, round(config.n_embd / even))}.")
        if config.head_dim % 2:
            raise UserError(f"heads are {config.head_dim} wide (n_embd {config.n_embd} / n_head {config.n_head}), but "
                            f"rotary embeddings need an even width. Change --n-embd or --n-head.")
        if config.n_head % config.n_kv_head:
            raise UserError(f"n_head {config.n_head} is not divisible by n_kv_head {config.n_kv_head}. "
                            f"Take a divisor of {config.n_head} for --n-kv-head.")
        if config.norm == "inner" and not config.sub_norm:
            raise UserError("--no-sub-norm leaves out a norm that --norm inner has in every layer. Take one of them.")
        if not config.n_ff:  # packed formats have blocks of 256 or 64 weights along a row
            block = 256 if config.n_embd % 256 == 0 else 64
            config.n_ff = max(1, round(config.n_embd * 8 / 3 / block)) * block
        return config

    def unfit(self, twin: str, **fitting: tuple[str, ...]) -> str:
        """The first setting that a format has no place for, as `--scale row`; "" where all fit. fitting: the values
        that it can mean, by setting. The quantizers' do not concern gpt."""
        return next((f"{flag(name)} {getattr(self, name)}" for name, values in fitting.items()
                     if getattr(self, name) not in values and (twin == "bitgpt" or name == "norm")), "")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean X?' or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def convert(field: dataclasses.Field[Any], kind: type, value: Any, name: str) -> Any:
    """`value` (text of a flag, or a TOML or JSON value) as the type of the field, within its limits."""
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    problem = UserError(f"{name} {value!r}: expected {expected}.")
    if "on" in field.metadata["choices"] and str(value).lower() in ("true", "false"):  # said as of a plain switch
        value = "on" if str(value).lower() == "true" else "off"
    if kind is bool:
        if isinstance(value, str) and value.lower() in ("true", "false", "1", "0", "yes", "no"):
            value = value.lower() in ("true", "1", "yes")
        if not isinstance(value, bool):
            raise problem
    elif isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise problem
    elif kind is str:
        if not isinstance(value, str):
            raise problem
        if re.search("[\0\ud800-\udfff]", value):  # which no file of a run could keep
            raise UserError(f"{name} {value!r} holds what is no UTF-8 text. Rename it, or write it in UTF-8.")
        if field.metadata["path"]:
            value = os.path.expanduser(value)
    else:
        try:
            number = float(value)
            if not math.isfinite(number) or (kind is int and number != int(number)):
                raise ValueError
            exact = isinstance(value, int) or (isinstance(value, str) and re.fullmatch("[+-]?[0-9_]+", value))
            value = int(value) if kind is int and exact else kind(number)
        except (ValueError, OverflowError):
            raise problem from None
    limits = field.metadata
    if limits["choices"] and value not in limits["choices"]:
        raise UserError(f"{name} {value!r} is not known.{did_you_mean(str(value), limits['choices'])} "
                        f"Choose from: {', '.join(limits['choices'])}.")
    if kind in (int, float):
        for bad, rule in ((value < limits["low"], f"at least {limits['low']:,.10g}"),
                          (value <= limits["above"], f"above {limits['above']:g}"),
                          (value > limits["high"], f"at most {limits['high']:,.10g}"),
                          (value >= limits["below"], f"below {limits['below']:g}")):
            if bad:
                raise UserError(f"{name} is {value}, but must be {rule}.")
    return value


def fields_of(configs: Iterable[type]) -> dict[str, tuple[dataclasses.Field[Any], type]]:
    """Field name -> (field, its type: int, float, str or bool), over several dataclasses."""
    return {field.name: (field, hints[field.name]) for config in configs
            for hints in [typing.get_type_hints(config)] for field in dataclasses.fields(config)}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def join_negative(argv: list[str]) -> list[str]:
    """`--lr -1e-3` as `--lr=-1e-3`: argparse would take the number for a flag, and its message would mislead."""
    joined: list[str] = []
    for word in argv:
        if re.fullmatch(r"-(\d|\.\d|inf|nan).*", word) and joined and re.fullmatch(r"--[\w-]+", joined[-1]):
            joined[-1] += "=" + word
        else:
            joined.append(word)
    return joined


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors and whose unknown flags get a did-you-mean."""

    def error(self, message: str) -> typing.NoReturn:
        if message.endswith("expected one argument"):
            message += " (one that begins with - is written --flag=-value)"
        raise UserError(f"{message}. `{self.prog} --help` lists the flags.")

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        values, unknown = self.parse_known_args(join_negative(sys.argv[1:] if argv is None else argv))
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            name = unknown[0].split("=")[0]
            raise UserError(f"unknown argument {unknown[0]!r}.{did_you_mean(name, known)} "
                            f"`{self.prog} --help` lists the flags.")
        return values


def parser(doc: str | None, configs: Iterable[type], several: bool = False, command: str = "") -> Parser:
    """A parser with one flag a field; only flags that were given appear in its result.

    doc: the script's docstring, shown by --help. several: flags take lists of values. command: the word before them.
    """
    made = Parser(prog=f"{sys.argv[0]} {command}".strip(), description=doc, allow_abbrev=False,
                  formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    for config in configs:
        group = made.add_argument_group(config.__name__)
        for field, kind in fields_of([config]).values():
            add_flag(group, field, kind, several)
    return made


def add_flag(group: Any, field: dataclasses.Field[Any], kind: type, several: bool = False, prefix: str = "") -> None:
    """Adds --name (and its alias; for a bool also --no-name) for one field. prefix: put before it, as in --gpt-lr."""
    name = prefix + field.name
    names = [flag(name)] + ([flag(field.metadata["alias"])] if field.metadata["alias"] and not prefix else [])

    def read(text: str) -> Any:
        return convert(field, kind, text, names[0])

    help = field.metadata["help"].replace("%", "%%")
    if field.metadata["choices"]:
        help += f": {', '.join(field.metadata['choices'])}"
    if field.default not in ("", None):
        help += f" [{field.default}]"
    if kind is bool:
        group.add_argument(*names, dest=name, type=read, nargs="*" if several else "?", metavar="BOOL", help=help,
                           **({} if several else {"const": True}))
        group.add_argument(flag("no_" + name), dest=name, action="store_const", const=False, help=argparse.SUPPRESS)
    else:
        several_or_switch: dict[str, Any] = {"nargs": "+"} if several else (
            {"nargs": "?", "const": "on"} if "on" in field.metadata["choices"] else {})
        group.add_argument(*names, dest=name, type=read, metavar=kind.__name__.upper(), help=help, **several_or_switch)


def read_toml(path: str | Path, configs: Iterable[type], twin: str) -> dict[str, Any]:
    """The settings of a TOML file ("": none): its plain keys, then those of the section named as the twin."""
    if not path:
        return {}
    try:
        content = tomllib.loads(Path(os.path.expanduser(path)).read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        shipped = sorted(map(os.path.relpath, CONFIGS.glob("*.toml")))
        raise UserError(f"--config {path}: no such file. Shipped: {', '.join(shipped)}") from None
    except IsADirectoryError:
        raise UserError(f"--config {path} is a folder. Name a .toml file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"--config {path} is not valid TOML: {error}.") from None
    known = fields_of(configs)
    sections = {name: content.pop(name) for name in TWINS if isinstance(content.get(name), dict)}
    for section in (content, *sections.values()):
        for key in section:
            if key in TWINS:
                raise UserError(f"{path}: {key} is a table of the settings of one twin. Write it as [{key}].")
            if key not in known and isinstance(section[key], dict):
                raise UserError(f"{path}: unknown table [{key}].{did_you_mean(key, TWINS)} Only settings of one twin "
                                "stand in a table: [gpt] or [bitgpt].")
            if key not in known:
                raise UserError(f"{path}: unknown key {key!r}.{did_you_mean(key, [*known, *TWINS])}")
    return {key: convert(*known[key], value, f"{path}: {key}")
            for key, value in {**content, **sections.get(twin, {})}.items()}


def build(configs: Iterable[type], *layers: dict[str, Any]) -> list[Any]:
    """One instance of each dataclass, from layers of settings of rising precedence."""
    merged = {key: value for layer in layers for key, value in layer.items()}
    return [config(**{name: merged[name] for name in fields_of([config]) if name in merged}) for config in configs]


def from_saved(config: type, saved: Any, where: str) -> Any:
    """A dataclass from the JSON that `dataclasses.asdict` of it made. A missing field takes its default and says
    so; an unknown one is a UserError."""
    known = fields_of([config])
    if not isinstance(saved, dict):
        raise UserError(f"{where}: {config.__name__} is not a table of settings.")
    for key in saved:
        if key not in known:
            raise UserError(f"{where}: unknown setting {key!r}.{did_you_mean(key, known)} "
                            "Was it written by a newer version?")
    missing = [key for key in known if key not in saved]
    if missing:
        names, defaults = (", ".join(map(repr, values)) for values in (
            missing, [known[key][0].default for key in missing]))
        print(f"note: {where} has no {names}; taking the default{'s' * (len(missing) > 1)} {defaults}", file=sys.stderr)
    return config(**{key: convert(*known[key], value, f"{where}: {key}") for key, value in saved.items()})
