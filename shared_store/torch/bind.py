"""Binding: a model built of placeholders becomes the model that a manifest describes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shared_store.base.errors import BindingError
from shared_store.base.manifest import Manifest, TensorEntry
from shared_store.torch import references
from shared_store.torch.mapped_model import MappedModel
from shared_store.torch.placeholders import Placeholders
from shared_store.torch.reach import tensors_from
from shared_store.torch.tensors import NamedTensor, tensors_of
from shared_store.torch.views import StorageKey, storage_key, view_of


@dataclass(frozen=True)
class Bound:
    """The result of binding.

    Attributes:
        mapped_bytes: bytes that are shared.
        private_bytes: bytes that were copied.
        tensors: number of tensors.
    """

    mapped_bytes: int
    private_bytes: int
    tensors: int


def bind(
    model: nn.Module, manifest: Manifest, mapped: MappedModel, placeholders: Placeholders, *, min_bytes: int
) -> Bound:
    """Bind a whole model at once. See :class:`Binder` for arguments.

    Raises:
        BindingError: the model lacks a module of the manifest, or a tensor would stay a placeholder; it is named.
    """
    binder = Binder(model, manifest, mapped, placeholders, min_bytes=min_bytes)
    binder.bind()
    return binder.finish()


class Binder:
    """Gives a model exactly the tensors of a manifest, at once or layer by layer.

    Tensor objects of the model are reused, with their subclass and attributes, so that references elsewhere in the
    engine stay valid; references to their memory follow. Tensors that the manifest does not name are removed, and
    tensors that the model lacks are added.
    """

    def __init__(
        self, model: nn.Module, manifest: Manifest, mapped: MappedModel, placeholders: Placeholders, *, min_bytes: int
    ) -> None:
        """Prepare to bind; the model is not changed.

        Args:
            model: built as the publisher's was, so that its modules have the same paths.
            manifest: describes the result.
            mapped: the manifest's blobs, mapped for reading.
            placeholders: those that the model was built of. None is left after :meth:`finish`.
            min_bytes: smaller blobs are copied instead of mapped.
        """
        self._model = model
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._placeholders = placeholders
        self._blobs = mapped
        self._manifest = manifest
        self._paths: dict[nn.Module, list[str]] = defaultdict(list)
        for path, module in self._modules.items():
            self._paths[module].append(path)
        self._mapped = {index for index in range(len(manifest.blobs)) if mapped.shared(index, min_bytes)}
        self._mapped -= {entry.blob for entry in manifest.tensors if entry.host}
        self._storages: list[torch.UntypedStorage] | None = None
        self._made: dict[int, torch.Tensor] = {}
        self._taken: dict[int, int] = {}
        self._late: dict[nn.Module, list[TensorEntry]] = {}
        self._last: dict[nn.Module, list[TensorEntry]] = defaultdict(list)

    def bind(
        self, but: Iterable[nn.Module] = (), *, completes_itself: Callable[[nn.Module], bool] = lambda _: False
    ) -> None:
        """Bind all modules except some.

        Args:
            but: modules that are left alone until :meth:`bind_late` is called for each of them.
            completes_itself: True for a module that makes some of its tensors only after all others are bound; those
                are bound by :meth:`finish`.

        Raises:
            BindingError: the model lacks a module of the manifest, or the new memory of a reference is ambiguous.
        """
        self._late = {module: [] for module in but}
        with torch._C.DisableTorchFunctionSubclass():  # engines' subclasses intercept every access
            named = list(tensors_of({path: it for path, it in self._modules.items() if it not in self._late}))
            now = []
            # Parameters first: a tensor that is also an attribute elsewhere becomes a Parameter in both places.
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
            origins = references.origins_of(named)
            _remove_unnamed(named, self._modules, self._manifest)
            self._bind_entries(now)
            if references.has_references(self._placeholders, origins):
                references.follow(self._model, self._placeholders, origins, last=not self._late)

    def materialize(self, module: nn.Module, device: torch.device) -> None:
        """Give a late module's tensors memory on a device, filled with zeros, where they are placeholders or meta."""
        with torch._C.DisableTorchFunctionSubclass():
            for named in tensors_of({"": module}):
                tensor = named.tensor
                if tensor.is_meta or self._placeholders.is_placeholder(tensor):
                    zeros = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
                    if tensor.is_meta:  # the device of a tensor object cannot change
                        _groups(module)[named.kind][named.name] = _twin(tensor, zeros)
                    else:
                        tensor.data = zeros

    def bind_late(self, module: nn.Module) -> None:
        """Bind a late module, whose tensors are now equal to the publisher's in everything except their values.

        Raises:
            BindingError: they differ; the first difference is named.
        """
        self._bind_alike(module, self._late[module])

    def finish(self) -> Bound:
        """Bind all remaining tensors, and check that no placeholder is left.

        Raises:
            BindingError: a placeholder is left, or a module did not make a tensor that it should have completed.
        """
        for module, entries in self._last.items():
            self._bind_alike(module, entries, strict=False)
        with torch._C.DisableTorchFunctionSubclass():
            if self._late and references.has_references(self._placeholders, {}):
                references.follow(self._model, self._placeholders, {}, last=True)
        mapped_bytes = sum(self._manifest.blobs[index].nbytes for index in self._mapped)
        return Bound(mapped_bytes, self._manifest.nbytes - mapped_bytes, len(self._made))

    def _bind_alike(self, module: nn.Module, entries: Sequence[TensorEntry], *, strict: bool = True) -> None:
        """Bind tensors of a module that match their entries. ``strict``: the module has no tensors without an entry."""
        with torch._C.DisableTorchFunctionSubclass():
            named = list(tensors_of(dict.fromkeys(self._paths[module], module)))
            self._check_alike(named, entries, strict=strict)
            origins = references.origins_of(named)
            self._bind_entries(entries)
            if references.has_references(None, origins):
                references.follow(module, self._placeholders, origins, last=False)

    def _check_alike(self, named: Iterable[NamedTensor], entries: Iterable[TensorEntry], *, strict: bool) -> None:
        """Raise :class:`BindingError` unless tensors match their entries in all but values."""
        found = {one.path: self._look(one) for one in named}
        wanted = {
            entry.path: (entry.kind, entry.dtype, tuple(entry.shape), tuple(entry.stride), entry.host)
            for entry in entries
        }
        for path in sorted({*found, *wanted} if strict else wanted):
            if found.get(path) != wanted.get(path):
                raise BindingError(
                    f"{path} is {found.get(path, 'missing')} here, and {wanted.get(path, 'missing')} in the manifest"
                )

    def _look(self, named: NamedTensor) -> tuple[str, str, tuple[int, ...], tuple[int, ...], bool]:
        """Describe a tensor as a manifest entry does, without its location."""
        tensor = named.tensor
        dtype = str(tensor.dtype).removeprefix("torch.")
        host = tensor.device.type == "cpu" and self._manifest.device != "cpu"
        return named.kind, dtype, tuple(tensor.shape), tuple(tensor.stride()), host

    def _bind_entries(self, entries: Iterable[TensorEntry]) -> None:
        """Set the tensors of some entries of the manifest on their modules."""
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
            _set(module, entry, tensor)


def measure(model: nn.Module, mapped: MappedModel) -> Bound:
    """Measure the mapped and private bytes of a model by the addresses of its tensors."""
    storages: dict[StorageKey, int] = {}
    tensors = 0
    for _, tensor in tensors_from(model):
        if (key := storage_key(tensor)) is not None:
            storages[key] = tensor.untyped_storage().nbytes()
            tensors += 1
    shared = sum(nbytes for (_, address), nbytes in storages.items() if mapped.covers(address))
    return Bound(shared, sum(storages.values()) - shared, tensors)


def _storages(manifest: Manifest, blobs: MappedModel, mapped: Collection[int]) -> list[torch.UntypedStorage]:
    """Return a storage for each blob: mapped, or a copy on the device or the host."""
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


def _become(old: torch.Tensor | None, view: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    """Put a view behind an existing tensor object, or return it as a new one."""
    if old is None or not old.is_leaf:
        old = nn.Parameter(view, requires_grad=False) if entry.kind == "parameter" else view
    else:
        old.requires_grad_(False)
        old.data = view
    return old.requires_grad_(entry.requires_grad)


def _twin(tensor: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """Return another object with a tensor's class and attributes, and other data."""
    twin = torch.Tensor._make_subclass(type(tensor), data, False)
    twin.__dict__.update(tensor.__dict__)
    return twin


def _groups(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Return a module's registers of tensors, by the kind of tensor."""
    return {"parameter": module._parameters, "buffer": module._buffers, "attribute": module.__dict__}


def _set(module: nn.Module, entry: TensorEntry, tensor: torch.Tensor) -> None:
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


def _remove_unnamed(tensors: Iterable[NamedTensor], modules: Mapping[str, nn.Module], manifest: Manifest) -> None:
    """Remove tensors from their modules that a manifest does not name."""
    named = {(entry.module, entry.name) for entry in manifest.tensors}
    for tensor in tensors:
        if (tensor.module, tensor.name) not in named:
            for group in _groups(modules[tensor.module]).values():
                group.pop(tensor.name, None)
