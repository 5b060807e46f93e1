"""The commands. Only click is imported here, so that `agentflow --help` answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal, NoReturn

import click

import agentflow
from agentflow.cli import errors, webhook_group

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def main(arguments: list[str] | None = None) -> NoReturn:
    """The console script. Ends the process: 0 well, 1 what was asked for failed, 2 wrong usage or settings, 3 no servers."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    try:
        status = cli(arguments, prog_name="agentflow", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "agentflow"
        return _say(f"{errors.one_line(error.format_message())} (`{path} --help` shows how)", errors.USAGE)
    except click.ClickException as error:
        return _say(errors.one_line(error.format_message()), errors.WRONG)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:  # `agentflow jobs list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:  # what is foreseen becomes one line; the rest keeps its traceback
        failure = errors.explained(error)
        if failure is None:
            raise
        return _say(str(failure), failure.status)


def _say(message: str, status: int) -> int:
    print(f"agentflow: {message}", file=sys.stderr)
    return status


class _Group(click.Group):
    """Called without a command, it shows its help."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])


@click.group(cls=_Group, context_settings=_CONTEXT)
@click.version_option(agentflow.__version__, message="agentflow %(version)s")
def cli() -> None:
    """Background jobs that cannot get lost: start AgentFlow, hand work in, look at it.

    Settings come from the environment (see README). Without any, everything runs on this machine in AGENTFLOW_HOME.
    """


@cli.command()
@click.option("--host", help="Address to listen at.  [default: 127.0.0.1; with PORT set, all addresses]")
@click.option("--port", type=click.IntRange(0, 65535), help="Port; 0 takes a free one.  [default: PORT, or 8000]")
@click.option("--announce", type=int, hidden=True, help="Descriptor of a socket: gets the URL; its end is ours.")
def up(host: str | None, port: int | None, announce: int | None) -> None:
    """Run everything in one process: web, worker threads and schedule.

    Postgres and Valkey are started too, unless DATABASE_URL and REDIS_URL name others. Ctrl-C or SIGTERM stops: running
    jobs get SHUTDOWN_GRACE seconds, then they are handed back; a second signal hands them back at once.
    """
    from agentflow.cli import serve

    serve.up(host, port, announce)


@cli.command(context_settings={**_CONTEXT, "allow_interspersed_args": True})
@click.option("-n", "--number", type=click.IntRange(1, 100), default=1, show_default=True, help="Worker processes.")
@click.option(
    "-Q", "--queues", multiple=True, metavar="QUEUE …", help="Take jobs of these queues only: default, heavy, gpu."
)
@click.option("--threads", type=click.IntRange(1, 1000), help="Jobs at once in each.  [default: JOB_CONCURRENCY]")
@click.option("--module", default="actors", hidden=True, help="What to import for the types of jobs.")
@click.option(
    "--child", hidden=True, help="Be one of the processes: parent, descriptors of its probe and its readiness."
)
@click.argument("more", metavar="", nargs=-1)
def worker(
    number: int, queues: tuple[str, ...], threads: int | None, module: str, child: str | None, more: tuple[str, ...]
) -> None:
    """Run worker processes, and start them again when they die.

    Each is what `dramatiq actors --processes 1` runs. SIGTERM, SIGHUP or Ctrl-C stops them: running jobs get SHUTDOWN_GRACE
    seconds, then they are handed back; a second signal hands them back at once. /health and /metrics on PORT are of all.
    """
    from agentflow.cli import workers

    if more and not queues:
        raise click.UsageError(f"Got unexpected extra argument ({more[0]}); queues follow -Q")
    names = (*queues, *more)
    if child is not None:
        workers.run_child(child, names, threads, module)
    workers.work(number, names, threads, module)


@cli.command()
@click.argument("video", metavar="FILE|URL")
@click.option("--url", "base", envvar="AGENTFLOW_URL", help="A running AgentFlow (its key: ADMIN_API_KEY).")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the pictures.  [default: ./agentflow-NAME]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON; pictures are fetched only with --out.")
def analyze(video: str, base: str | None, out: Path | None, as_json: bool) -> None:
    """Find a video's shots, with a picture of each and a contact sheet.

    Uses the AgentFlow at --url, or the one that runs on this machine's home, or starts one for as long as it takes.
    """
    from agentflow.cli import video as videos

    videos.analyze(video, base, out, as_json)


@cli.group(cls=_Group)
def jobs() -> None:
    """Look at jobs, hand them in, cancel them, try them again."""


_STATES = ["queued", "running", "succeeded", "failed", "cancelled"]


@jobs.command("list")
@click.option("--state", type=click.Choice(_STATES))
@click.option("--type", "type_", metavar="TYPE")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_jobs(state: str | None, type_: str | None, limit: int, as_json: bool) -> None:
    """The newest jobs."""
    from agentflow.cli import job_commands

    job_commands.list_jobs(state, type_, limit, as_json)


@jobs.command("show")
@click.argument("job", metavar="ID", type=click.UUID)
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def show_job(job: object, as_json: bool) -> None:
    """One job: its state, attempts, progress, result, and the jobs before and after it."""
    from agentflow.cli import job_commands

    job_commands.show(str(job), as_json)


@jobs.command("cancel")
@click.argument("job", metavar="ID", type=click.UUID)
def cancel_job(job: object) -> None:
    """Cancel a queued job; stop a running one."""
    from agentflow.cli import job_commands

    job_commands.cancel(str(job))


@jobs.command("retry")
@click.argument("job", metavar="ID", type=click.UUID)
def retry_job(job: object) -> None:
    """Try a failed or cancelled job again, as a new job."""
    from agentflow.cli import job_commands

    job_commands.retry(str(job))


@jobs.command("submit")
@click.argument("type_", metavar="TYPE")
@click.argument("payload", metavar="JSON", default="{}")
@click.option("--wait", is_flag=True, help="Wait for its end; exit 1 if it fails.")
def submit_job(type_: str, payload: str, wait: bool) -> None:
    """Hand in a job, such as: agentflow jobs submit ping '{"sleep_ms": 100}'"""
    from agentflow.cli import job_commands

    job_commands.submit(type_, payload, wait)


@cli.group(cls=_Group)
def orgs() -> None:
    """Organizations: whose jobs are whose."""


@orgs.command("create")
@click.argument("slug")
@click.option("--name", help="For people.  [default: the slug]")
def create_organization(slug: str, name: str | None) -> None:
    """Make an organization, such as: agentflow orgs create acme --name 'Acme Ltd'"""
    from agentflow.cli import organization_commands

    organization_commands.create(slug, name)


@orgs.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_organizations(as_json: bool) -> None:
    """All organizations."""
    from agentflow.cli import organization_commands

    organization_commands.list_all(as_json)


@cli.group(cls=_Group)
def keys() -> None:
    """API keys of organizations. A key is shown once, when it is made."""


_SCOPES = ["submit", "read", "manage", "webhooks"]
_ORGANIZATION = click.option(
    "--org", metavar="SLUG", default="default", show_default=True, help="The organization, by slug or number."
)


@keys.command("create")
@_ORGANIZATION
@click.option("--name", required=True, help="What uses the key.")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(_SCOPES),
    multiple=True,
    help="What it may do; may be repeated.  [default: all]",
)
@click.option("--expires", "expires_days", type=click.FloatRange(0, 36_500, min_open=True), help="In so many days.")
def create_key(org: str, name: str, scopes: tuple[str, ...], expires_days: float | None) -> None:
    """Make a key and print it: the only line on stdout."""
    from agentflow.cli import organization_commands

    organization_commands.create_key(org, name, scopes or tuple(_SCOPES), expires_days)


@keys.command("list")
@click.option("--org", metavar="SLUG", help="Of one organization.  [default: of all]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_keys(org: str | None, as_json: bool) -> None:
    """Keys, the newest first: what they may do, when they were used last."""
    from agentflow.cli import organization_commands

    organization_commands.list_keys(org, as_json)


@keys.command("rotate")
@click.argument("key", metavar="ID|PREFIX")
@click.option(
    "--grace",
    "grace_h",
    type=click.FloatRange(0, 720),
    default=24.0,
    show_default=True,
    help="Hours that the old one works.",
)
def rotate_key(key: str, grace_h: float) -> None:
    """Make a key with the same name, scopes and expiry and print it; the old one ends after the grace."""
    from agentflow.cli import organization_commands

    organization_commands.rotate_key(key, grace_h)


@keys.command("revoke")
@click.argument("key", metavar="ID|PREFIX")
def revoke_key(key: str) -> None:
    """End a key now: within seconds it is refused everywhere."""
    from agentflow.cli import organization_commands

    organization_commands.revoke_key(key)


@cli.group(cls=_Group)
def knowledge() -> None:
    """The knowledge base: search in it, and the model that makes its vectors."""


@knowledge.command("search")
@click.argument("question")
@click.option("--org", metavar="SLUG", default="1", help="In this organization's documents.  [default: number 1]")
@click.option("--limit", type=click.IntRange(1, 50), default=10, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def search_knowledge(question: str, org: str, limit: int, as_json: bool) -> None:
    """Search by meaning and by words."""
    from agentflow.cli import knowledge_commands

    knowledge_commands.search_for(question, org, limit, as_json)


@knowledge.command("models")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_models(as_json: bool) -> None:
    """The embedding models, and how far each is filled."""
    from agentflow.cli import knowledge_commands

    knowledge_commands.show_models(as_json)


@knowledge.command("switch")
@click.argument("model", metavar="PROVIDER/MODEL")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def switch_model(model: str, yes: bool) -> None:
    """Use another embedding model, such as: agentflow knowledge switch openrouter/openai/text-embedding-3-small

    Says what it will cost, then a job makes all vectors anew; searches go on with the old ones until it is done. Interrupted,
    it goes on where it was. The active model named again: what is missing is made.
    """
    from agentflow.cli import knowledge_commands

    knowledge_commands.switch(model, sure=yes)


@knowledge.command("discard")
def discard_model() -> None:
    """Give up a switch that is under way."""
    from agentflow.cli import knowledge_commands

    knowledge_commands.discard()


@cli.group(cls=_Group)
def rules() -> None:
    """What is paused, how much runs at once, how often others are called, what a day may cost. In force within two seconds,
    everywhere."""


_OF = click.option("--org", metavar="SLUG", help="Of this organization alone.  [default: of each]")
_KIND = click.Choice(["queue", "type", "organization"])


@rules.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_rules(as_json: bool) -> None:
    """All rules that were set."""
    from agentflow.cli import rule_commands

    rule_commands.show(as_json)


@rules.command("pause")
@click.argument("kind", type=_KIND)
@click.argument("name")
@_OF
@click.option("--reason", help="Shown to whoever asks why.")
def pause(kind: str, name: str, org: str | None, reason: str | None) -> None:
    """Hold jobs back, such as: agentflow rules pause type analyze_video. What runs goes on to its end."""
    from agentflow.cli import rule_commands

    rule_commands.pause(kind, name, org, reason)


@rules.command("resume")
@click.argument("kind", type=_KIND)
@click.argument("name")
@_OF
def resume(kind: str, name: str, org: str | None) -> None:
    """End a pause: what it held back is due at once."""
    from agentflow.cli import rule_commands

    rule_commands.resume(kind, name, org)


@rules.command("cap")
@click.argument("running", metavar="N|off")
@click.option("--type", "type_", metavar="TYPE", help="Of this type.  [default: of all types together]")
@_OF
def cap(running: str, type_: str | None, org: str | None) -> None:
    """At most N jobs of an organization at once."""
    from agentflow.cli import rule_commands

    if running != "off" and not (running.isdecimal() and 1 <= int(running) <= 100_000):
        raise click.UsageError(f"{running!r} is neither a number from 1 to 100000 nor off")
    rule_commands.cap(None if running == "off" else int(running), type_, org)


@rules.command("limit")
@click.argument("provider")
@click.argument("windows", metavar="CALLS/SECONDS…", nargs=-1)
@_OF
def limit(provider: str, windows: tuple[str, ...], org: str | None) -> None:
    """How often a provider may be called, such as: agentflow rules limit type:analyze_video 10/60 100/3600

    `type:NAME` limits the starts of jobs of a type. Without windows the default counts again.
    """
    from agentflow.cli import rule_commands

    rule_commands.limit(provider, windows, org)


@rules.command("budget")
@click.argument("measure")
@click.argument("per_day", metavar="AMOUNT|off")
@_OF
def budget(measure: str, per_day: str, org: str | None) -> None:
    """What may be used up in a day (UTC), such as: agentflow rules budget usd 5 --org acme

    Measures are what attempts report: usd, tokens, tokens_in, tokens_out, model_calls, audio_s, gpu_s, video_min, crm_calls.
    """
    from agentflow.cli import rule_commands

    rule_commands.budget(measure, per_day, org)


@cli.group(cls=_Group)
def schedules() -> None:
    """Jobs at certain times: cron lines, intervals, single moments. A running scheduler notices within seconds."""


_SCHEDULE = click.argument("schedule", metavar="ID|NAME")


@schedules.command("list")
@click.option("--org", metavar="SLUG", help="Of one organization.  [default: of all]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_schedules(org: str | None, as_json: bool) -> None:
    """Schedules, the newest first, and when they tick next."""
    from agentflow.cli import schedule_commands

    schedule_commands.list_all(org, as_json)


@schedules.command("create")
@click.argument("name")
@click.argument("type_", metavar="TYPE")
@click.option("--org", default="default", show_default=True, metavar="SLUG", help="Whose it is.")
@click.option("--payload", default="{}", show_default=True, metavar="JSON", help="The job's arguments.")
@click.option("--cron", metavar="'M H D M W'", help="Minute, hour, day of month, month, day of week.")
@click.option("--zone", default="UTC", show_default=True, help="Whose clocks --cron goes by, such as Europe/Berlin.")
@click.option("--every", "every_s", type=click.IntRange(1), metavar="SECONDS", help="Again and again after so long.")
@click.option("--at", metavar="TIME", help="Once, such as 2026-03-01T07:30:00+01:00.")
@click.option("--jitter", "jitter_s", type=click.IntRange(0, 86_400), default=0, help="Up to so many seconds late.")
def create_schedule(
    name: str,
    type_: str,
    org: str,
    payload: str,
    cron: str | None,
    zone: str,
    every_s: int | None,
    at: str | None,
    jitter_s: int,
) -> None:
    """Have jobs of a type made at certain times: one of --cron, --every and --at.

    \b
    agentflow schedules create 'every morning' ping --cron '30 7 * * mon-fri' --zone Europe/Berlin
    """
    from agentflow.cli import schedule_commands
    from agentflow.schedules.when import When

    when = When(cron, every_s, schedule_commands.moment(at) if at else None, zone)
    schedule_commands.create(org, name, type_, payload, when, jitter_s)


@schedules.command("show")
@_SCHEDULE
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def show_schedule(schedule: str, as_json: bool) -> None:
    """One schedule: its next five times, and what became of the last ones."""
    from agentflow.cli import schedule_commands

    schedule_commands.show(schedule, as_json)


@schedules.command("pause")
@_SCHEDULE
def pause_schedule(schedule: str) -> None:
    """Make no more jobs until it is resumed."""
    from agentflow.cli import schedule_commands

    schedule_commands.enable(schedule, False)


@schedules.command("resume")
@_SCHEDULE
def resume_schedule(schedule: str) -> None:
    """Go on from now; what was missed while it was paused is not made up for."""
    from agentflow.cli import schedule_commands

    schedule_commands.enable(schedule, True)


@schedules.command("run")
@_SCHEDULE
def run_schedule(schedule: str) -> None:
    """Hand its job in now, and print the job's id."""
    from agentflow.cli import schedule_commands

    schedule_commands.run(schedule)


@schedules.command("delete")
@_SCHEDULE
def delete_schedule(schedule: str) -> None:
    """Delete a schedule and its history; jobs that it made stay."""
    from agentflow.cli import schedule_commands

    schedule_commands.delete(schedule)


@cli.group(cls=_Group)
def graph() -> None:
    """The graph of documents."""


@graph.command("types")
@click.option("--org", help="Slug or number of an organization.  [default: number 1]")
@click.option(
    "--file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="JSON as this command prints it."
)
@click.option("--default", is_flag=True, help="The types of a new organization again.")
def graph_types(org: str | None, file: Path | None, default: bool) -> None:
    """Which types of entities and relations are looked for; with --file, from now on."""
    from agentflow.cli import graph_commands

    graph_commands.types(org, file, default)


@cli.group(cls=_Group)
def crm() -> None:
    """CRM accounts (Kommo): connecting them, their syncs, plans and runs."""


_MODE = click.option(
    "--mode",
    type=click.Choice(["incremental", "backfill", "reconcile"]),
    default="incremental",
    show_default=True,
    help="What has changed; everything; or everything, and what is gone is deleted.",
)
_ACCOUNT = click.argument("account", metavar="ID", type=click.UUID)


@crm.command("connect")
@click.argument("host")
@_ORGANIZATION
@click.option("--name", help="For people.  [default: the host]")
def connect_account(host: str, org: str, name: str | None) -> None:
    """Connect an account such as example.kommo.com; its long-lived token is read from stdin. Prints the account's id."""
    from agentflow.cli import crm_commands

    crm_commands.connect(host, org, name)


@crm.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_accounts(as_json: bool) -> None:
    """The accounts of all organizations, and what stopped those that stopped."""
    from agentflow.cli import crm_commands

    crm_commands.list_all(as_json)


@crm.command("runs")
@_ACCOUNT
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_runs(account: object, as_json: bool) -> None:
    """What the syncs of an account did, the newest first."""
    from agentflow.cli import crm_commands

    crm_commands.list_runs(str(account), as_json)


@crm.command("sync")
@_ACCOUNT
@_MODE
def sync_account(account: object, mode: Literal["incremental", "backfill", "reconcile"]) -> None:
    """Sync an account now; prints the job's id."""
    from agentflow.cli import crm_commands

    crm_commands.sync(str(account), mode, plan=False)


@crm.command("plan")
@_ACCOUNT
@_MODE
def plan_account(account: object, mode: Literal["incremental", "backfill", "reconcile"]) -> None:
    """A dry run: its result (`agentflow jobs show`) says what a sync would change, and what it costs. Prints the job's id."""
    from agentflow.cli import crm_commands

    crm_commands.sync(str(account), mode, plan=True)


@crm.command("confirm")
@_ACCOUNT
def confirm_account(account: object) -> None:
    """Let the deletions through that wait to be confirmed; prints the job's id."""
    from agentflow.cli import crm_commands

    crm_commands.confirm(str(account))


@cli.group(cls=_Group)
def callbacks() -> None:
    """Callbacks: what was delivered, telling it once more, and the secrets that sign them."""


@callbacks.command("list")
@click.argument("subject", metavar="JOB|BATCH", type=click.UUID)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_callbacks(subject: object, as_json: bool) -> None:
    """The callbacks of a job or batch, with every attempt."""
    from agentflow.cli import organization_commands

    organization_commands.list_callbacks(str(subject), as_json)


@callbacks.command("replay")
@click.argument("callback", metavar="ID", type=click.UUID)
def replay_callback(callback: object) -> None:
    """Tell it once more, under the same webhook-id."""
    from agentflow.cli import organization_commands

    organization_commands.replay_callback(str(callback))


@callbacks.command("secret")
@_ORGANIZATION
@click.option(
    "--grace",
    "grace_h",
    type=click.FloatRange(0, 720),
    default=24.0,
    show_default=True,
    help="Hours for which the secret before it signs along.",
)
def create_secret(org: str, grace_h: float) -> None:
    """Make a secret to sign an organization's callbacks with, and print it: the only line on stdout."""
    from agentflow.cli import organization_commands

    organization_commands.create_secret(org, grace_h)


@callbacks.command("secrets")
@_ORGANIZATION
def list_secrets(org: str) -> None:
    """The secrets that sign now: when they were made, and end."""
    from agentflow.cli import organization_commands

    organization_commands.list_secrets(org)


cli.add_command(webhook_group.webhooks)
cli.add_command(webhook_group.rotate_key)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def queues(as_json: bool) -> None:
    """What waits and runs, by queue, and the workers that live."""
    from agentflow.cli import job_commands

    job_commands.queues(as_json)


@cli.command()
@click.option(
    "--count", type=click.IntRange(1, 10_000), default=5, show_default=True, help="How many, one after the other."
)
@click.option("--timeout", type=click.FloatRange(0.1, 3600), default=10.0, show_default=True, help="Seconds for each.")
def ping(count: int, timeout: float) -> None:
    """Send ping jobs through the whole system and say how long each took."""
    from agentflow.cli import job_commands

    job_commands.ping(count, timeout)


@cli.command()
def doctor() -> None:
    """Check settings, servers, schema, storage, disk and clock, and say what to do about what is wrong."""
    from agentflow.cli import checkup

    checkup.doctor()


@cli.command()
@click.option("--minutes", type=click.FloatRange(0.2, 1440), help="How long the load lasts.  [default: 2; a soak: 30]")
@click.option(
    "--seed", type=click.IntRange(0), help="The same seed is the same load and the same faults.  [default: any]"
)
@click.option("--faults", metavar="A,B,…", help="Only these kinds of fault.")
@click.option("--jobs-per-minute", type=click.FloatRange(10), help="[default: 3300; a soak: 6000]")
@click.option("--url", help="Load and check the AgentFlow there by its API; nothing is killed.")
@click.option("--yes", "agreed", is_flag=True, help="With --url: yes, hand all those jobs in there.")
@click.option("--cluster", is_flag=True, help="Three RabbitMQ nodes with quorum queues; nodes are killed.")
@click.option("--redis", is_flag=True, help="Redis as the broker, although RabbitMQ is installed.")
@click.option("--soak", "soaks", is_flag=True, help="No faults: does any process grow?")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for the report, journals and logs."
)
def prove(
    minutes: float | None,
    seed: int | None,
    faults: str | None,
    jobs_per_minute: float | None,
    url: str | None,
    agreed: bool,
    cluster: bool,
    redis: bool,
    soaks: bool,
    out: Path | None,
) -> int:
    """Show that nothing is lost: load a private copy of the whole system, hurt it, and check its history.

    Exit status: 0 all well, 1 something is wrong, 2 the run was too weak to mean anything.
    """
    from agentflow.cli import proving

    return proving.prove(minutes, seed, faults, jobs_per_minute, url, agreed, cluster, redis, soaks, out)
