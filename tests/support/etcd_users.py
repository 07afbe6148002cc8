"""Users of an etcd: from then on it wants a name and a password from everybody."""

from __future__ import annotations

from aetcd import rpc

from discovery.etcd import EtcdClient


async def enable_users(client: EtcdClient, name: str, password: str, prefix: str) -> None:
    """Asks for a login from now on: `name` may do everything under `prefix`, root (password: root) everywhere."""

    def auth(method):
        return lambda channel: getattr(rpc.AuthStub(channel), method)

    end = prefix[:-1].encode() + b"0"
    permission = rpc.Permission(permType=rpc.Permission.READWRITE, key=prefix.encode(), range_end=end)
    await client.call(auth("UserAdd"), rpc.AuthUserAddRequest(name="root", password="root"))
    await client.call(auth("RoleAdd"), rpc.AuthRoleAddRequest(name="root"))
    await client.call(auth("UserGrantRole"), rpc.AuthUserGrantRoleRequest(user="root", role="root"))
    await client.call(auth("UserAdd"), rpc.AuthUserAddRequest(name=name, password=password))
    await client.call(auth("RoleAdd"), rpc.AuthRoleAddRequest(name=name))
    await client.call(auth("RoleGrantPermission"), rpc.AuthRoleGrantPermissionRequest(name=name, perm=permission))
    await client.call(auth("UserGrantRole"), rpc.AuthUserGrantRoleRequest(user=name, role=name))
    await client.call(auth("AuthEnable"), rpc.AuthEnableRequest())
