"""Who calls, and what a role may do."""

from __future__ import annotations

from enum import StrEnum

from hostler.model.base import Record


class Role(StrEnum):
    """admin: everything; operator: run VMs, not change the host; viewer: look; host: another Hostler host."""

    ADMIN = "admin"
    OPERATOR = "operator"
    VIEWER = "viewer"
    HOST = "host"


class Permission(StrEnum):
    VIEW = "view"
    OPERATE = "operate"
    CONFIGURE = "configure"
    ADMINISTER = "administer"
    PEER = "peer"


GRANTS: dict[Role, frozenset[Permission]] = {
    Role.ADMIN: frozenset({Permission.VIEW, Permission.OPERATE, Permission.CONFIGURE, Permission.ADMINISTER}),
    Role.OPERATOR: frozenset({Permission.VIEW, Permission.OPERATE}),
    Role.VIEWER: frozenset({Permission.VIEW}),
    Role.HOST: frozenset({Permission.PEER}),
}


class Principal(Record):
    """An authenticated caller. `name` is for the audit trail: "uid 0", "token backup", "host 3f..."."""

    name: str
    role: Role
    host_id: str | None = None

    def may(self, permission: Permission) -> bool:
        """Whether its role grants `permission`."""
        return permission in GRANTS[self.role]
