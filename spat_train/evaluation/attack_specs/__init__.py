"""Every attack by name: the published ones with their settings, others by a small grammar, NAME[xN][:key=value]*.

    pgd-20                             as published: a name of the list
    pgd-40x20                          with 20 restarts
    pgd-40-least-likely                targeted: -least-likely, -random or -all after any PGD
    pgd-20:alpha=0.2:steps=50          with other settings
    pgd:steps=50:step=1/20:loss=margin:restarts=5:eps=16/255
    pgd-100:stop=exact                 ends at a success, or where the iterates go in a cycle

Without stop=, PGD of 50 steps or more looks for cycles on CPUs where that changes no bit; stop=none does not.
    autoattack:norm=l1:eps=12          in another norm: linf, l2 or l1

Names may be in capitals (AutoAttack, PGD-20, AA), and so may the values that are names (norm=L2).
Lengths of steps are in units of eps. eps itself is the evaluation's, or given here, in the units of images in [0, 1]. Losses are
those of `spat_kernels.losses`, each with its settings (alpha, kappa).
"""

import re
from collections.abc import Sequence
from typing import Any

from ...errors import InputError, as_input_error, did_you_mean
from .attack import Attack, read_setting
from .families import FAMILIES, NAMED, TARGETS

ALIASES = {"aa": "autoattack", "aa-fast": "autoattack-fast", "aa-plus": "autoattack-plus", "aa-rand": "autoattack-rand"}


def parse(spec: str | Attack) -> Attack:
    """The attack that `spec` names.

    Raises:
        InputError: there is no such attack, setting or value; the message has the nearest.
    """
    if isinstance(spec, Attack):
        return spec
    name, *settings = spec.strip().split(":")
    name = re.sub(r"^.+?(?=(x[1-9]\d*)?$)", lambda base: ALIASES.get(base[0], base[0]), name.lower())
    base, values = published(name)
    family, *preset = NAMED[base][0].split(":") if base in NAMED else [base]
    if family not in FAMILIES:
        near = did_you_mean(name, {**NAMED, **ALIASES, **FAMILIES})
        raise InputError(
            f"attack {name}: there is none: {near}see spat-train attacks, or write pgd:steps=50:step=1/20 and the like"
        )
    given: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise InputError(f"attack {spec}: {setting!r} is no setting: write key=value, such as steps=50")
        if key in given:
            raise InputError(f"attack {spec}: {key} is given twice")
        given[key] = value
    kind, values = FAMILIES[family], dict(setting.split("=") for setting in preset) | values | given
    known = kind.readers()
    if unknown := next((key for key in values if key not in known), None):
        near = did_you_mean(unknown, known)
        raise InputError(f"attack {spec}: {kind.family} has no setting {unknown}: {near}it has {', '.join(known) or 'none'}")
    own: dict[str, Any] = {key: value for key, value in values.items() if key in kind.__dataclass_fields__}
    with as_input_error(f"attack {spec}"):
        of_loss = tuple((key, read_setting(key, known[key], values[key])) for key in known if key in values and key not in own)
        own |= {"settings": of_loss} if of_loss else {}
        return kind(name=":".join([name, *settings]), **own)


def published(name: str) -> tuple[str, dict[str, str]]:
    """The name in `NAMED` (or a family's) that NAME[-TARGET][xN] begins with, and the settings that the rest stands for."""
    base, values = name, {}
    if base not in NAMED and (repeated := re.fullmatch(r"(.+?)x([1-9]\d*)", base)):
        base, values["restarts"] = repeated.groups()
    if base not in NAMED:
        for target in TARGETS:
            bare = base.removesuffix(f"-{target}")
            if bare != base and NAMED.get(bare, ("",))[0].startswith("pgd:"):
                base, values["target"] = bare, target
    return base, values


def parse_all(specs: Sequence[str | Attack] | str) -> dict[str, Attack]:
    """By name: "clean" first, then `specs` in their order; a str is split at commas.

    Raises:
        InputError: as `parse`, or two have the same name or are the same.
    """
    attacks, written = {"clean": parse("clean")}, dict[str, str]()
    for spec in specs.split(",") if isinstance(specs, str) else specs:
        attack = parse(spec)
        twin = written.get(attack.spec) if isinstance(spec, str) else None
        if attack.name in attacks and attack.name != "clean":
            raise InputError(f"attack {attack.name}: it is named twice: leave one out")
        if twin:
            raise InputError(f"attack {attack.name}: it is the same as {twin}: leave one out")
        attacks[attack.name] = attack
        if isinstance(spec, str) and attack.name != "clean":
            written[attack.spec] = attack.name
    return attacks
