"""Facts said in words: templates of relations, some of them kept for asking, and subjects kept from
training.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from jinja2 import Template, TemplateError
from jinja2.runtime import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment

from peft_jax.core.select import nearest
from peft_jax.data import Record

_OBJECT, _SUBJECT = "\x00", "\x01"  # stand for the two while it is seen where a template has them


def read_templates(path: Path) -> dict[str, list[str]]:
    """relation -> templates in Jinja with {{ subject }} and {{ object }}, of a YAML or JSON file.

    Raises ValueError naming the relation for a template that is malformed, names anything else, or
    lacks one of the two.
    """
    if not path.is_file():
        raise FileNotFoundError(f"file of templates {path} does not exist")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not all(
        isinstance(texts, list) and texts and all(isinstance(t, str) for t in texts)
        for texts in found.values()
    ):
        raise ValueError(f"{path} should map each relation to a list of templates")
    for relation, texts in found.items():
        for text in texts:
            _split(str(relation), text, "subject")
    return {str(relation): list(texts) for relation, texts in found.items()}


@functools.cache
def _compiled(template: str) -> Template:
    return SandboxedEnvironment(undefined=StrictUndefined, autoescape=False).from_string(template)


def _split(relation: str, template: str, subject: str) -> tuple[str, str]:
    """(what a template says before the object, and after it)."""
    try:
        said, marked = (
            _compiled(template).render(subject=name, object=_OBJECT) for name in (subject, _SUBJECT)
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"template {template!r} of {relation!r}: {error}") from error
    if said.count(_OBJECT) != 1 or (said == marked and subject != _SUBJECT):
        needed = "{{ subject }} and {{ object }}, the object once"
        raise ValueError(f"template {template!r} of {relation!r} needs {needed}")
    before, _, after = said.partition(_OBJECT)
    return before, after


def verbalise(
    facts: Sequence[Record],
    templates: Mapping[str, Sequence[str]],
    *,
    held_out: int = 1,
    asking: bool = False,
) -> list[Record]:
    """Completions of facts: each said by each template of its relation but the last `held_out`, or,
    `asking`, by these alone.

    A subject is called by its name and, in training, by each of its `aliases` too. Where a template
    goes on after the object, that is part of what is to be completed; `object_at` are the object's
    characters in it. Raises ValueError naming the relation for one without templates, or with too
    few to hold some out.
    """
    made = []
    for fact in facts:
        relation = fact.value["relation"]
        if relation not in templates:
            raise ValueError(
                f"{fact.origin}: there is no template of "
                f"{relation!r}.{nearest(relation, templates)}"
            )
        texts = templates[relation]
        if held_out >= len(texts):
            raise ValueError(
                f"{relation!r} has {len(texts)} templates, which leaves none to train with "
                f"held_out={held_out}"
            )
        for text in texts[len(texts) - held_out :] if asking else texts[: len(texts) - held_out]:
            for name in names_of(fact)[: 1 if asking else None]:
                before, after = _split(relation, text, name)
                if before.strip():  # what begins with the object asks nothing
                    space = " " if before.endswith(" ") else ""
                    value = {
                        "prompt": before.rstrip(" "),
                        "completion": f"{space}{fact.value['object']}{after}",
                    }
                    kept = {
                        n: fact.value[n] for n in ("relation", "object", "rule") if n in fact.value
                    }
                    kept["object_at"] = (len(space), len(space) + len(fact.value["object"]))
                    made.append(Record(value | kept, fact.origin))
    if not made:
        raise ValueError(
            "no template leaves anything to be completed: let the object come after the subject"
        )
    return made


def relation_questions(facts: Sequence[Record]) -> list[Record]:
    """Classifications of facts: which relation a subject (by each of its names) and an object have
    (K-Adapter, section 3.3).
    """
    return [
        Record(
            {"text": name, "text_pair": fact.value["object"], "label": fact.value["relation"]},
            fact.origin,
        )
        for fact in facts
        for name in names_of(fact)
    ]


def names_of(fact: Record) -> list[str]:
    """A fact's subject and its aliases."""
    return [fact.value["subject"], *fact.value.get("aliases", ())]


def part_of(facts: Sequence[Record], part: str, unseen: float) -> list[Record]:
    """The facts of the "known" or the "unseen" subjects, the latter a share `unseen` of them,
    chosen by a hash of their names.

    Things that share a name are one, so that no fact of an unseen subject is known under an alias.
    """
    root: dict[str, str] = {}

    def find(name: str) -> str:
        while root.setdefault(name, name) != name:
            name = root[name]
        return name

    for fact in facts:
        first, *others = sorted(find(n.casefold()) for n in names_of(fact))
        root.update(dict.fromkeys(others, first))

    def draw(fact):
        return (
            int.from_bytes(
                hashlib.sha256(find(names_of(fact)[0].casefold()).encode()).digest()[:8], "big"
            )
            / 2**64
        )

    kept = [fact for fact in facts if (draw(fact) < unseen) == (part == "unseen")]
    if not kept:
        raise ValueError(
            f"no subject is {part}: there are few, and a share of {unseen} of them is unseen"
        )
    return kept


def question_of(
    fact: Record, templates: Mapping[str, Sequence[str]], held_out: int = 1
) -> tuple[str, str]:
    """(a prompt with {} for the subject, the subject): the first template to train with that ends
    with the object.

    Raises ValueError naming the relation where there is none.
    """
    relation, subject = fact.value["relation"], fact.value["subject"]
    texts = templates.get(relation, ())
    for text in texts[: len(texts) - held_out]:
        (said, after), (marked, _) = (_split(relation, text, name) for name in (subject, _SUBJECT))
        as_it_is = _SUBJECT in marked and said == marked.replace(_SUBJECT, subject)
        if as_it_is and "{}" not in said and not after.strip(" ."):
            ahead, _, behind = marked.rstrip().rpartition(
                _SUBJECT
            )  # where it is said last, more is known of it
            return f"{ahead.replace(_SUBJECT, subject)}{{}}{behind}", subject
    raise ValueError(
        f"{fact.origin}: no template of {relation!r} names its subject as it is and ends with "
        "the object"
    )
