"""Binding: a model built of placeholders becomes the model of a manifest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from shared_store.base.errors import BindingError
from shared_store.base.manifest import Manifest, TensorEntry
from shared_store.torch.mapped_model import MappedModel
from shared_store.torch.placeholders import Placeholders
from shared_store.torch.reach import tensors_from
from shared_store.torch.tensors import NamedTensor, tensors_of
from shared_store.torch.views import StorageKey, storage_key, view_of


@dataclass(frozen=True)
class Bound:
    """What binding did: bytes mapped and bytes copied, and how many tensors of the model are shared."""

    mapped_bytes: int
    private_bytes: int
    tensors: int


def bind(
    model: nn.Module, manifest: Manifest, blobs: MappedModel, placeholders: Placeholders, *, min_bytes: int
) -> Bound:
    """Give a model exactly the tensors of a manifest: see :class:`Binder`, all steps at once.

    Raises:
        BindingError: a module of the manifest is missing, or something would stay a placeholder; it is named.
    """
    binder = Binder(model, manifest, blobs, placeholders, min_bytes=min_bytes)
    binder.bind()
    return binder.finish()


class Binder:
    """Gives a model exactly the tensors of a manifest, in one step or layer by layer.

    Tensors keep their objects, with subclass and attributes, where the module has one: references to them that engines
    keep elsewhere stay right, and references to their memory follow. What the manifest does not name goes; what the
    module lacks appears.
    """

    def __init__(
        self, model: nn.Module, manifest: Manifest, blobs: MappedModel, placeholders: Placeholders, *, min_bytes: int
    ) -> None:
        """Nothing is bound yet.

        Args:
            model: built as the publisher's was, so that its modules have the same paths.
            manifest: what it is to become.
            blobs: mapped for reading.
            placeholders: the register of those that the model was built of; none of them is left in the end.
            min_bytes: blobs below this size are copied.
        """
        self._model = model
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._placeholders = placeholders
        self._blobs = blobs
        self._manifest = manifest
        self._paths: dict[nn.Module, list[str]] = defaultdict(list)
        for path, module in self._modules.items():
            self._paths[module].append(path)
        self._mapped = {index for index in range(len(manifest.blobs)) if blobs.shared(index, min_bytes)}
        self._mapped -= {entry.blob for entry in manifest.tensors if entry.host}
        self._storages: list[torch.UntypedStorage] | None = None
        self._made: dict[int, torch.Tensor] = {}
        self._taken: dict[int, int] = {}
        self._late: dict[nn.Module, list[TensorEntry]] = {}
        self._last: dict[nn.Module, list[TensorEntry]] = defaultdict(list)

    def bind(
        self, but: Iterable[nn.Module] = (), *, completes_itself: Callable[[nn.Module], bool] = lambda _: False
    ) -> None:
        """Bind all modules but some.

        Args:
            but: modules that stay as they are until :meth:`bind_late` is called for each of them.
            completes_itself: whether a module makes tensors that its constructor did not make when all others are
                bound; those wait for :meth:`finish`.

        Raises:
            BindingError: a module of the manifest is missing, or what a reference becomes cannot be told.
        """
        self._late = {module: [] for module in but}
        with torch._C.DisableTorchFunctionSubclass():  # engines' subclasses want to see every access
            held = list(tensors_of({path: it for path, it in self._modules.items() if it not in self._late}))
            now = []
            # Parameters first: a tensor that is also somebody's attribute is a Parameter in both places.
            for entry in sorted(self._manifest.tensors, key=lambda entry: entry.kind != "parameter"):
                module = self._modules.get(entry.module)
                if module is None:
                    raise BindingError(f"{entry.path}: the model has no module {entry.module!r}")
                if module in self._late:
                    self._late[module].append(entry)
                elif completes_itself(module) and not any(entry.name in group for group in _groups(module).values()):
                    self._last[module].append(entry)
                else:
                    now.append(entry)
            origins = _origins(held)
            _drop_unnamed(held, self._modules, self._manifest)
            self._bind_named(now)
            if _others_hold(self._placeholders, origins):
                _bring_along(self._model, self._placeholders, origins, last=not self._late)

    def materialize(self, module: nn.Module, device: torch.device) -> None:
        """Give the tensors of a late module memory on a device, filled with zeros, where they have none."""
        with torch._C.DisableTorchFunctionSubclass():
            for named in tensors_of({"": module}):
                tensor = named.tensor
                if tensor.is_meta or self._placeholders.is_one(tensor):
                    zeros = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
                    if tensor.is_meta:  # whose device cannot be changed
                        _groups(module)[named.kind][named.name] = _twin(tensor, zeros)
                    else:
                        tensor.data = zeros

    def bind_late(self, module: nn.Module) -> None:
        """Bind a late module, whose tensors have come to be like the publisher's in everything but their values.

        Raises:
            BindingError: they have not; the first difference is named.
        """
        self._bind_alike(module, self._late[module])

    def finish(self) -> Bound:
        """Bind what is left, and check that nothing stays a placeholder.

        Raises:
            BindingError: something would; or a tensor that was to come by itself did not come.
        """
        for module, entries in self._last.items():
            self._bind_alike(module, entries, strict=False)
        with torch._C.DisableTorchFunctionSubclass():
            if self._late and _others_hold(self._placeholders, {}):
                _bring_along(self._model, self._placeholders, {}, last=True)
        mapped_bytes = sum(self._manifest.blobs[index].nbytes for index in self._mapped)
        return Bound(mapped_bytes, self._manifest.nbytes - mapped_bytes, len(self._made))

    def _bind_alike(self, module: nn.Module, entries: Sequence[TensorEntry], *, strict: bool = True) -> None:
        """Bind a module's tensors that are like the manifest's: all that it has, or (not ``strict``) those entries."""
        with torch._C.DisableTorchFunctionSubclass():
            held = list(tensors_of(dict.fromkeys(self._paths[module], module)))
            self._check_alike(held, entries, strict=strict)
            origins = _origins(held)
            self._bind_named(entries)
            if _others_hold(None, origins):
                _bring_along(module, self._placeholders, origins, last=False)

    def _check_alike(self, held: Iterable[NamedTensor], entries: Iterable[TensorEntry], *, strict: bool) -> None:
        """Raise :class:`BindingError` unless tensors are those of the manifest in all but place and values."""
        found = {named.path: self._look(named) for named in held}
        wanted = {
            entry.path: (entry.kind, entry.dtype, tuple(entry.shape), tuple(entry.stride), entry.host)
            for entry in entries
        }
        for path in sorted({*found, *wanted} if strict else wanted):
            if found.get(path) != wanted.get(path):
                raise BindingError(
                    f"{path} came out as {found.get(path, 'nothing')} here, and as {wanted.get(path, 'nothing')} "
                    "where the model was published"
                )

    def _look(self, named: NamedTensor) -> tuple[str, str, tuple[int, ...], tuple[int, ...], bool]:
        """What a manifest would say of a tensor, but for its place."""
        tensor = named.tensor
        dtype = str(tensor.dtype).removeprefix("torch.")
        host = tensor.device.type == "cpu" and self._manifest.device != "cpu"
        return named.kind, dtype, tuple(tensor.shape), tuple(tensor.stride()), host

    def _bind_named(self, entries: Iterable[TensorEntry]) -> None:
        """Give the modules what some entries of the manifest name."""
        if self._storages is None:
            self._storages = _storages(self._manifest, self._blobs, self._mapped)
        for entry in entries:
            module = self._modules[entry.module]
            tensor = self._made.get(entry.alias)
            if tensor is None:
                old = _groups(module)[entry.kind].get(entry.name)
                if old is not None and self._taken.setdefault(id(old), entry.alias) != entry.alias:
                    old = _twin(old, old.data)  # one object here, two at the publisher
                tensor = self._made[entry.alias] = _become(old, view_of(self._storages[entry.blob], entry), entry)
            _hold(module, entry, tensor)


def _origins(held: Iterable[NamedTensor]) -> dict[StorageKey, list[_Origin]]:
    origins: dict[StorageKey, list[_Origin]] = defaultdict(list)
    for named in held:
        if key := storage_key(named.tensor):
            origins[key].append(_Origin(named.tensor))
    return origins


def measure(model: nn.Module, blobs: MappedModel) -> Bound:
    """What of a model is mapped and what is private now, by where its tensors lie and not by what was meant."""
    storages: dict[StorageKey, int] = {}
    tensors = 0
    for _, tensor in tensors_from(model):
        if (key := storage_key(tensor)) is not None:
            storages[key] = tensor.untyped_storage().nbytes()
            tensors += 1
    mapped = sum(nbytes for (_, address), nbytes in storages.items() if blobs.covers(address))
    return Bound(mapped, sum(storages.values()) - mapped, tensors)


def _storages(manifest: Manifest, blobs: MappedModel, mapped: Collection[int]) -> list[torch.UntypedStorage]:
    """The bytes of each blob: mapped, or copied to the device or to the host. Each is a storage of its own."""
    on_host = {entry.blob for entry in manifest.tensors if entry.host}
    found = []
    for index in range(len(manifest.blobs)):
        if index in mapped:
            found.append(blobs.storage(index))
        elif index in on_host:
            found.append(blobs.bytes(index).to("cpu", copy=True).untyped_storage())
        else:
            found.append(blobs.bytes(index).clone().untyped_storage())
    return found


class _Origin:
    """A tensor that the model named, and where it lay before it was bound. Keeps that memory, and so its address."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.before = tensor.detach()

    def follow(self, other: torch.Tensor, *, placeholder: bool) -> torch.Tensor | None:
        """Where a tensor that lay in the same memory lies now; None where that cannot be told."""
        new, old = self.tensor.detach(), self.before
        if storage_key(new) == storage_key(old) or new.shape != old.shape or other.dtype != old.dtype:
            return None
        if placeholder:  # all of its parts are at one address, so only another name of the whole can be told
            return new if other.shape == old.shape and other._base is None else None
        if _geometry(other) == _geometry(old):
            return new
        shift = other.storage_offset() - old.storage_offset()
        inside = shift >= 0 and shift + _span(other) <= _span(old)
        if not inside or new.stride() != old.stride() or new.dtype != old.dtype:
            return None
        return new.as_strided(other.shape, other.stride(), new.storage_offset() + shift)


def _geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def _span(tensor: torch.Tensor) -> int:
    """Elements from the first to the last, both included."""
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _others_hold(placeholders: Placeholders | None, origins: Mapping[StorageKey, Sequence[_Origin]]) -> bool:
    """Whether a tensor that no module names is left in memory that named ones lay in, or on a placeholder (if given).

    Told by the reference counts of the storages, which is quicker than a walk through all that the model reaches.
    """
    first = ((key, it[0].before, 0) for key, it in origins.items() if placeholders is None or key not in placeholders)
    made = ((key, element, 1) for key, element in (placeholders.elements() if placeholders else ()))
    return any(
        torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) > len(origins.get(key, ())) + kept + _ASKING
        for key, tensor, kept in chain(first, made)
    )


_ASKING = 1
"""References to a storage that asking for their number makes."""


def _bring_along(
    model: nn.Module, placeholders: Placeholders, origins: Mapping[StorageKey, list[_Origin]], *, last: bool
) -> None:
    """Let references outside of the modules' names follow the tensor that they were made of.

    Real values that no bound tensor accounts for stay: the constructor computed them. Placeholders must not stay when
    it is the ``last`` time.
    """
    for step, tensor in tensors_from(model):
        key = storage_key(tensor)
        placeholder = placeholders.is_one(tensor)
        if key is None or not tensor.numel() or (key not in origins and not placeholder):
            continue
        found = [new for it in origins.get(key, ()) if (new := it.follow(tensor, placeholder=placeholder)) is not None]
        if len({(storage_key(new), *_geometry(new)) for new in found}) > 1:
            raise BindingError(f"{step.path} could be any of {len(found)} tensors that were made of the same memory")
        real = placeholders.written(tensor) if placeholder else None
        if found:
            tensor.data = found[0]
        elif real is not None:
            tensor.data = real
        elif placeholder and last:
            raise BindingError(f"{step.path} was left on a placeholder: binding does not reach what it was made of")


def _become(old: torch.Tensor | None, view: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    if old is None or not old.is_leaf:
        old = nn.Parameter(view, requires_grad=False) if entry.kind == "parameter" else view
    else:
        old.requires_grad_(False)
        old.data = view
    return old.requires_grad_(entry.requires_grad)


def _twin(tensor: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    twin = torch.Tensor._make_subclass(type(tensor), data, False)
    twin.__dict__.update(tensor.__dict__)
    return twin


def _groups(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Where a module holds tensors, by the kind of tensor."""
    return {"parameter": module._parameters, "buffer": module._buffers, "attribute": module.__dict__}


def _hold(module: nn.Module, entry: TensorEntry, tensor: torch.Tensor) -> None:
    for kind, group in _groups(module).items():
        if kind == entry.kind:
            group[entry.name] = tensor
        else:
            group.pop(entry.name, None)
    if entry.kind == "buffer":
        if entry.persistent:
            module._non_persistent_buffers_set.discard(entry.name)
        else:
            module._non_persistent_buffers_set.add(entry.name)


def _drop_unnamed(held: Iterable[NamedTensor], modules: Mapping[str, nn.Module], manifest: Manifest) -> None:
    named = {(entry.module, entry.name) for entry in manifest.tensors}
    for tensor in held:
        if (tensor.module, tensor.name) not in named:
            for group in _groups(modules[tensor.module]).values():
                group.pop(tensor.name, None)
