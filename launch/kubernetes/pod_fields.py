"""Checks of a pod written as a mapping, against the models of Kubernetes' Python client: names and types of its fields.

The API server drops a field that it does not know, or refuses the pod; here it is named before anything is submitted.
"""

import difflib
import re
from typing import Any, Callable, Dict, List, Optional, Tuple

from fuxi_torchrec.errors import UserError

POD = "V1Pod"
FEW = 12  # fields that a message lists
# The keys of TorchX's overlays that do more than add: "__join__:containers:image" and the like.
OPERATOR = re.compile(r"__(put|join|del)__:([^:]*)(?::(.*))?")
_WORDS: Dict[str, Tuple[Tuple[type, ...], str]] = {
    "str": ((str,), "text, in quotes"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "datetime": ((str,), "a time, in quotes"),
}
Refuse = Callable[[str, str], UserError]


def check_overlay(values: object, refuse: Refuse) -> None:
    """Checks what is laid over a pod: its keys may be TorchX's operators where TorchX resolves them, not inside lists.
    Raises what `refuse(place, why)` makes of the first fault and its place, such as spec.tolerations[0].key."""
    _Checker(refuse, whole=False).check(values, POD, "", True)


def check_pod(values: object, refuse: Refuse) -> None:
    """Checks a whole pod, which has all that it must have. Raises as `check_overlay` does."""
    _Checker(refuse, whole=True).check(values, POD, "", False)


class _Checker:
    """A walk over a mapping and the model of what it should be.

    A type is as the client writes it: str, object, List[V1Container], Dict[str, str] (list[…] and dict(…) in older ones).
    """

    def __init__(self, refuse: Refuse, whole: bool):
        self.refuse, self.whole = refuse, whole

    def check(self, value: Any, kind: str, place: str, operators: bool) -> None:
        """Checks a value of a type, and all within it."""
        if value is None:
            raise self.refuse(place, "has no value; give it one, or leave the key out")
        inner = re.fullmatch(r"[Ll]ist\[(.*)\]", kind)
        if inner:
            self._check_list(value, inner[1], place)
            return
        inner = re.fullmatch(r"[Dd]ict[\[(]str, (.*)[\])]", kind)
        if inner:
            for key, item in self._mapping(value, place).items():
                name, item_kind = self._operator(key, inner[1], place, operators)
                if item_kind is not None:
                    self.check(item, item_kind, _below(place, name), False)
            return
        if kind in _WORDS:
            self._check_word(value, kind, place)
        elif kind != "object":
            self._check_model(value, kind, place, operators)

    def _check_list(self, value: Any, kind: str, place: str) -> None:
        if not isinstance(value, list):
            raise self.refuse(place, f"must be a list, not {_shown(value)}")
        for index, item in enumerate(value):
            self.check(item, kind, f"{place}[{index}]", False)

    def _check_word(self, value: Any, kind: str, place: str) -> None:
        types, words = _WORDS[kind]
        if not isinstance(value, types) or (isinstance(value, bool) and kind != "bool"):
            raise self.refuse(place, f"must be {words}, not {_shown(value)}")

    def _check_model(self, value: Any, kind: str, place: str, operators: bool) -> None:
        fields, seen = _fields(kind), []
        for key, item in self._mapping(value, place).items():
            name, _ = self._operator(key, "", place, operators)
            if name not in fields:
                raise self.refuse(_below(place, name), f"there is no such field{_hint(name, fields)}")
            if name in seen:
                raise self.refuse(_below(place, name), "stands there twice, with and without an operator")
            seen.append(name)
            _, item_kind = self._operator(key, fields[name], place, operators)
            if item_kind is not None:
                self.check(item, item_kind, _below(place, name), operators and key == name)
        for name in _required(kind) if self.whole else []:
            if name not in seen:
                raise self.refuse(_below(place, name), "is missing")

    def _operator(self, key: str, kind: str, place: str, operators: bool) -> Tuple[str, Optional[str]]:
        """The field that a key means, and the type of its value: none for what is deleted."""
        if not key.startswith("__"):
            return key, kind
        parts = OPERATOR.fullmatch(key)
        if parts is None or not parts[2] or (parts[1] == "join") != bool(parts[3]):
            known = "__put__:FIELD, __del__:FIELD and __join__:FIELD:KEY"
            raise self.refuse(_below(place, key), f"there is no such operator; there are {known}")
        if not operators:
            field = parts[2]
            raise self.refuse(_below(place, key), f"operators work only on what every pod has already; write {field} plainly")
        return parts[2], None if parts[1] == "del" else kind

    def _mapping(self, value: Any, place: str) -> Dict[str, Any]:
        if not isinstance(value, dict):
            raise self.refuse(place, f"must hold keys and values, not {_shown(value)}")
        for key in value:
            if not isinstance(key, str):
                raise self.refuse(_below(place, str(key)), "a key must be text, in quotes")
        return value


def _fields(kind: str) -> Dict[str, str]:
    """The JSON names of a model's fields, and their types."""
    from kubernetes.client import models

    model = getattr(models, kind)
    return {name: model.openapi_types[field] for field, name in model.attribute_map.items()}


def _required(kind: str) -> List[str]:
    """The JSON names of the fields that a model must have; none where the client is one that cannot tell."""
    from kubernetes.client import models

    model = getattr(models, kind)
    known = getattr(model, "model_fields", {})
    return [name for field, name in model.attribute_map.items() if field in known and known[field].is_required()]


def _hint(name: str, fields: Dict[str, str]) -> str:
    small = {field.lower(): field for field in fields}
    plain = name.replace("_", "").lower()
    near = [plain] if plain in small else difflib.get_close_matches(plain, small, n=1)
    if near:
        return f"; did you mean {small[near[0]]}?"
    return f"; there are {', '.join(sorted(fields))}" if len(fields) <= FEW else "; 'kubectl explain pod.spec' lists them"


def _below(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
