"""Security: whom to believe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = ["Security"]


class _HasTrust(Protocol):
    @property
    def trusted(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """Who may make this process run code, which is what unpickling is, and whether plain text may be used at all.

    Args:
        pickle: "trusted" (default): pickles only from and to peers that are trusted, which are those in this process and on this
            machine's loopback interface; "never": from nobody; "always": from everybody, for closed networks only.
        trust_loopback: whether peers on this machine's loopback interface are trusted.
        require_encryption: refuse to listen on or connect to addresses whose transport neither encrypts nor stays in this process.
        enum_modules: root packages whose enums may be looked up when a peer names them.  A module is never imported for it.
    """

    pickle: Literal["trusted", "never", "always"] = "trusted"
    trust_loopback: bool = True
    require_encryption: bool = False
    enum_modules: tuple[str, ...] = ("dask", "distributed")

    def __post_init__(self) -> None:
        if self.pickle not in ("trusted", "never", "always"):
            raise ValueError(f"Security(pickle={self.pickle!r}): must be 'trusted', 'never' or 'always'")
        for name in ("trust_loopback", "require_encryption"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Security({name}={getattr(self, name)!r}): must be a bool")
        modules = self.enum_modules
        if isinstance(modules, str) or not all(isinstance(module, str) for module in modules):
            raise TypeError(f"Security(enum_modules={modules!r}): must be a tuple of package names")
        object.__setattr__(self, "enum_modules", tuple(modules))

    def allows_pickle(self, peer: _HasTrust) -> bool:
        """Whether a pickle may come from, or go to, this peer."""
        return self.pickle == "always" or (self.pickle == "trusted" and peer.trusted)
