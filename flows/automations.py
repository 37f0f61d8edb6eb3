"""What the Prefect server does by itself: it tells somebody of renders that go wrong, and gives up shards
whose process is gone."""

import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from avatar_core.errors import ConfigError
from flows.deploy import FLOW

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.schemas.automations import AutomationCore, EventTrigger

BLOCK = "avatar-notify"
"""The block that keeps the address."""
BACKSTOP = "avatar: shard without heartbeat"
SHARD_FLOW = "shard"
WITHOUT_HEARTBEAT = timedelta(seconds=90)

_TOLD_OF = {
    "avatar: a render failed": ("failed", {"Failed", "TimedOut"}),
    "avatar: a render crashed": ("crashed", {"Crashed"}),
    "avatar: a render is late": ("is late", {"Late"}),
}
"""By the automation's name: what the message says, and of which states of a run of the render flow."""


@dataclass(frozen=True)
class _Address:
    """A block's type and what it holds."""

    block_type: str
    data: dict[str, Any]


def set_notifications(client: "SyncPrefectClient", url: str | None) -> None:
    """From now on the server tells `url` of renders that failed, crashed or are late; None or "" for nobody.

    That is any http(s) address, which is sent {"text": ...} as JSON, or one that Apprise knows: the webhooks
    of Slack and Discord as they are, `mailto://...`, `tgram://...`. It may hold a token, and is kept
    encrypted. Raises `ConfigError` for any other.
    """
    if not url:
        for name in _TOLD_OF:
            _remove(client, name)
        _remove_blocks(client, ())
        return
    address = _address(url)
    block = _save_block(client, address)
    for name in _TOLD_OF:
        _put(client, _notification(name, block, _pages(client)), enabled=True)
    _remove_blocks(client, (address.block_type,))


def ensure_backstop(client: "SyncPrefectClient") -> None:
    """Sets shards whose lane has sent no heartbeat for 90 s to `Crashed`. Where somebody turned that off, it
    stays off."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, Posture

    trigger = _trigger(
        SHARD_FLOW,
        # Whatever happens to a run is a sign of life; only a heartbeat makes the next one be waited for.
        expect={"prefect.flow-run.*"},
        after={"prefect.flow-run.heartbeat"},
        posture=Posture.Proactive,
        within=WITHOUT_HEARTBEAT,
    )
    message = f"no heartbeat for {WITHOUT_HEARTBEAT.seconds} s: its process, or the whole machine, is gone"
    # Not by force: a run that has ended meanwhile stays as it is.
    crash = ChangeFlowRunState(name=None, state=StateType.CRASHED, message=message, force=False)
    about = "So that what a lost machine had in hand goes to another one."
    _put(client, AutomationCore(name=BACKSTOP, description=about, trigger=trigger, actions=[crash]))


def _notification(name: str, block: UUID, pages: str) -> "AutomationCore":
    from prefect.events.actions import SendNotification
    from prefect.events.schemas.automations import AutomationCore, Posture

    happened, states = _TOLD_OF[name]
    tell = SendNotification(
        block_document_id=block,
        subject=f"{{{{ flow_run.name }}}} {happened}",
        body=f"{{{{ flow_run.state.message or '' }}}}\n{pages}/runs/flow-run/{{{{ flow_run.id }}}}",
    )
    trigger = _trigger(
        FLOW,
        expect={f"prefect.flow-run.{state}" for state in states},
        posture=Posture.Reactive,
        within=timedelta(0),
    )
    about = "Made by `avatar up --notify`."
    return AutomationCore(name=name, description=about, trigger=trigger, actions=[tell])


def _trigger(flow: str, **what: Any) -> "EventTrigger":
    """On runs of that flow, each for itself."""
    from prefect.events.schemas.automations import EventTrigger

    return EventTrigger(
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related={"prefect.resource.role": "flow", "prefect.resource.name": flow},
        for_each={"prefect.resource.id"},
        threshold=1,
        **what,
    )


def _put(client: "SyncPrefectClient", wanted: "AutomationCore", enabled: bool | None = None) -> None:
    """Makes the automation of that name what is wanted, and the only one. Without `enabled` that stays."""
    found = client.read_automations_by_name(wanted.name)
    for surplus in found[1:]:
        client.delete_automation(surplus.id)
    if not found:
        client.create_automation(wanted)
        return
    wanted.enabled = found[0].enabled if enabled is None else enabled
    if wanted.model_dump() != found[0].model_dump(exclude={"id"}):
        client.update_automation(found[0].id, wanted)


def _remove(client: "SyncPrefectClient", name: str) -> None:
    for found in client.read_automations_by_name(name):
        client.delete_automation(found.id)


def _address(url: str) -> _Address:
    import apprise

    logging.getLogger("apprise").setLevel(logging.CRITICAL)  # it shows addresses that it does not know

    if apprise.Apprise.instantiate(url) is not None:
        # Prefect has no block for all that Apprise knows; that for Slack passes on any address.
        return _Address("slack-webhook", {"url": url})
    if url.startswith(("http://", "https://")):
        # The address is among the secrets, because the field for it is shown to everybody.
        shown = {"name": "avatar", "method": "POST", "url": "{{address}}"}
        text = {"text": "{{subject}}\n{{body}}"}
        return _Address("custom-webhook", {**shown, "json_data": text, "secrets": {"address": url}})
    scheme = url.partition("://")[0] if "://" in url else "no scheme"
    raise ConfigError(
        f"--notify: an address that nobody can be told at ({scheme}); give https://..., or one that Apprise "
        "knows, such as mailto://USER:PASSWORD@HOST or tgram://TOKEN/CHAT"
    )


def _save_block(client: "SyncPrefectClient", address: _Address) -> UUID:
    from prefect.client.schemas.actions import BlockDocumentCreate, BlockDocumentUpdate
    from prefect.exceptions import ObjectNotFound

    kind = client.read_block_type_by_slug(address.block_type)
    schema = client.get_most_recent_block_schema_for_block_type(kind.id)
    if schema is None:
        raise ObjectNotFound(RuntimeError(f"the server has no blocks of type {address.block_type}"))
    try:
        found = client.read_block_document_by_name(BLOCK, address.block_type)
    except ObjectNotFound:
        fresh = BlockDocumentCreate(
            name=BLOCK, data=address.data, block_schema_id=schema.id, block_type_id=kind.id
        )
        return client.create_block_document(fresh).id
    changed = BlockDocumentUpdate(data=address.data, block_schema_id=schema.id, merge_existing_data=False)
    client.update_block_document(found.id, changed)
    return found.id


def _remove_blocks(client: "SyncPrefectClient", kept: tuple[str, ...]) -> None:
    from prefect.exceptions import ObjectNotFound

    for block_type in ("slack-webhook", "custom-webhook"):
        if block_type in kept:
            continue
        with suppress(ObjectNotFound):
            client.delete_block_document(client.read_block_document_by_name(BLOCK, block_type).id)


def _pages(client: "SyncPrefectClient") -> str:
    """Where the server shows its runs, as this machine reaches it."""
    return os.environ.get("PREFECT_UI_URL") or f"{str(client.api_url).rstrip('/').removesuffix('/api')}/v2"
