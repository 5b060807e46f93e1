"""The tests' ComfyUI is one: it answers and tells as the recordings of two real versions do, and has each trap of theirs."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from json import loads
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.comfyui_server import DATA, VERSIONS, Comfy, comfyui
from tests.processes import eventually


class Client:
    def __init__(self, comfy: Comfy) -> None:
        self.comfy = comfy
        self.http = httpx2.Client(base_url=comfy.url, timeout=30)

    def get(self, path: str) -> Any:
        return self.http.get(path).json()

    def post(self, path: str, **body: Any) -> httpx2.Response:
        return self.http.post(path, json=body)

    def submit(self, graph: dict[str, Any], **more: Any) -> str:
        return str(self.post("/prompt", prompt=graph, **more).raise_for_status().json()["prompt_id"])

    def ended(self, prompt_id: str) -> Any:
        return eventually(lambda: self.get(f"/history/{prompt_id}").get(prompt_id), every_s=0.005)

    def rendered(self, graph: dict[str, Any], **more: Any) -> Any:
        return self.ended(self.submit(graph, **more))

    def running(self) -> list[str]:
        return [item[1] for item in self.get("/queue")["queue_running"]]

    @contextmanager
    def socket(self, client_id: str) -> Iterator[ClientConnection]:
        url = self.comfy.url.replace("http", "ws") + f"/ws?clientId={client_id}"
        with connect(url, close_timeout=1, compression=None, proxy=None) as socket:
            assert told(socket)["data"]["sid"] == client_id
            yield socket


@pytest.fixture
def comfy(tmp_path: Path) -> Iterator[Comfy]:
    with comfyui(tmp_path) as comfy:
        yield comfy


@pytest.fixture
def client(comfy: Comfy) -> Client:
    return Client(comfy)


def invert(prefix: str = "out", color: int = 1, seconds: float = 0) -> dict[str, Any]:
    middle = {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}}
    if seconds:
        middle = {"class_type": "TestSleep", "inputs": {"value": ["1", 0], "seconds": seconds}}
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": color}},
        "2": middle,
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": prefix}},
    }


def told(socket: ClientConnection) -> Any:
    return loads(socket.recv(timeout=30))


def until(socket: ClientConnection, type_: str, **data: Any) -> list[Any]:
    """Every message up to the one of this type with this data."""
    messages = [told(socket)]
    while messages[-1]["type"] != type_ or not data.items() <= messages[-1]["data"].items():
        messages.append(told(socket))
    return messages


def outlined(message: Any) -> list[Any]:
    """What of a message the recordings keep."""
    type_, data = message["type"], message["data"]
    match type_:
        case "status":
            return [type_, data["status"]["exec_info"]["queue_remaining"]]
        case "execution_cached":
            return [type_, sorted(data["nodes"])]
        case "executed":
            return [type_, data["node"], sorted(data["output"])]
        case "execution_error":
            return [type_, data["node_id"], data["exception_type"], data["exception_message"]]
    return [type_, data.get("node")]


def sorted_errors(answer: Any) -> Any:
    """Old servers look at a node's inputs in any order; lines of code are not ours to repeat."""
    text = json.dumps(answer, sort_keys=True)
    answer = json.loads(text, object_hook=lambda each: {k: v for k, v in each.items() if k != "traceback"})
    for node in answer.get("node_errors", {}).values() if isinstance(answer, dict) else ():
        node["errors"].sort(key=lambda error: error["details"])
    return answer


@pytest.mark.parametrize("version", VERSIONS)
def test_graphs_are_refused_as_real_servers_refuse_them(version: str, tmp_path: Path) -> None:
    with comfyui(tmp_path, version=version) as comfy:
        client = Client(comfy)
        Image.new("RGB", (4, 4)).save(comfy.files.of("input") / "probe.png")
        for recorded in loads((DATA / f"recorded-{version}.json").read_text())["refusals"]:
            answer = client.http.post("/prompt", json=recorded["body"])

            assert answer.status_code == recorded["status"], recorded["note"]
            if answer.status_code == 400:
                assert sorted_errors(answer.json()) == sorted_errors(recorded["answer"]), recorded["note"]
            else:
                assert answer.text == recorded["answer"], recorded["note"]


@pytest.mark.parametrize("version", VERSIONS)
def test_runs_are_told_in_the_order_of_real_servers(version: str, tmp_path: Path) -> None:
    for n, recorded in enumerate(loads((DATA / f"recorded-{version}.json").read_text())["runs"]):
        with comfyui(tmp_path / str(n), version=version) as comfy:
            client = Client(comfy)
            with client.socket("me") as socket:
                messages = []
                for prompt in recorded["prompts"]:
                    prompt_id = client.post("/prompt", client_id="me", **prompt).json()["prompt_id"]
                    messages += until(socket, "executing", node=None, prompt_id=prompt_id)

        outline = [outlined(message) for message in messages if message["type"] != "progress_state"]
        assert outline == recorded["events"], recorded["name"]


def test_progress_is_told_before_its_node_and_more_often_by_old_servers(tmp_path: Path) -> None:
    times_told = {}
    for version in VERSIONS:
        with comfyui(tmp_path / version, version=version) as comfy:
            client = Client(comfy)
            with client.socket("me") as socket:
                prompt_id = client.submit(invert(seconds=1), client_id="me")
                messages = until(socket, "executing", node=None, prompt_id=prompt_id)
        types = [message["type"] for message in messages]
        assert types.index("progress_state") < types.index("executing")
        values = [message["data"]["value"] for message in messages if message["type"] == "progress"]
        assert values == sorted(values)
        assert values[-1] == 1
        times_told[version] = len(values)

    assert times_told["0.3.64"] > 12 >= times_told["0.33.0"]  # each 10 ms, each 100 ms


def test_the_result_is_in_the_history_only_when_the_worker_let_go(comfy: Comfy, client: Client) -> None:
    comfy.history_gap_s = 60
    with client.socket("me") as socket:
        prompt_id = client.submit(invert(), client_id="me")

        until(socket, "execution_success")
        assert client.get(f"/history/{prompt_id}") == {}
        assert client.running() == [prompt_id]
        comfy.history_gap_s = 0
        until(socket, "executing", node=None)
        assert client.get(f"/history/{prompt_id}")[prompt_id]["status"]["completed"]


def test_pictures_are_real_and_carry_their_graph(client: Client) -> None:
    entry = client.rendered(
        invert("jobs/7/out", color=0xFF0000), extra_data={"extra_pnginfo": {"workflow": {"id": "w"}}}
    )

    [image] = entry["outputs"]["3"]["images"]
    answer = client.http.get("/view", params=image)
    with Image.open(io.BytesIO(answer.content)) as picture:
        assert picture.getpixel((0, 0)) == (0, 255, 255)
        assert loads(picture.text["prompt"])["3"]["inputs"]["filename_prefix"] == "jobs/7/out"  # type: ignore[attr-defined]
    assert image == {"filename": "out_00001_.png", "subfolder": "jobs/7", "type": "output"}
    assert answer.headers["content-disposition"] == 'filename="out_00001_.png"'
    assert client.http.get("/view", params={**image, "preview": "webp;50"}).headers["content-type"] == "image/webp"
    assert client.http.get("/view", params={**image, "filename": "no.png"}).status_code == 404
    assert client.http.get("/view", params={**image, "filename": "../no.png"}).status_code == 400
    assert client.http.get("/view", params={**image, "subfolder": "../.."}).status_code == 403


def test_no_history_says_nothing_and_a_restart_begins_at_nought(comfy: Comfy, client: Client) -> None:
    with client.socket("me") as socket:
        done = client.rendered(invert(color=9))
        running, pending = client.submit(invert(seconds=60)), client.submit(invert(color=2))
        eventually(client.running)
        assert [client.get(f"/history/{id_}") for id_ in (running, pending, "unknown")] == [{}, {}, {}]

        comfy.restart()

        with pytest.raises(ConnectionClosed) as closed:
            until(socket, "never")
        assert closed.value.rcvd is None  # 1006
    client.http.close()
    client = Client(comfy)
    assert client.get("/queue") == {"queue_running": [], "queue_pending": []}
    assert client.get("/history") == {}
    assert client.post("/prompt", prompt=invert("again")).json()["number"] == 0
    eventually(lambda: comfy.runs_of(running)[0].ended == "lost")
    assert client.http.get("/view", params=done["outputs"]["3"]["images"][0]).status_code == 200


def test_an_id_is_taken_again_and_each_copy_runs(comfy: Comfy, client: Client) -> None:
    id_ = str(uuid.uuid4())
    first = client.rendered(invert("first"), prompt_id=id_)
    client.submit(invert("second", seconds=60), prompt_id=id_)
    eventually(client.running)

    assert client.get(f"/history/{id_}") == {id_: first}
    assert client.get(f"/api/jobs/{id_}")["status"] == "completed"
    client.post("/interrupt", prompt_id=id_)
    eventually(lambda: client.get(f"/history/{id_}")[id_]["status"]["status_str"] == "error")
    assert comfy.times_run() == {id_: 2}


def test_the_same_id_and_number_answers_500_though_it_runs_and_a_third_ends_the_worker(
    comfy: Comfy, client: Client
) -> None:
    def blocked() -> str:
        id_ = client.submit(invert("blocks", seconds=60))
        eventually(lambda: client.running() == [id_])
        return id_

    blocking = blocked()
    twice = {"prompt_id": str(uuid.uuid4()), "number": 500}
    assert client.post("/prompt", prompt=invert("a"), **twice).status_code == 200
    assert client.post("/prompt", prompt=invert("b"), **twice).status_code == 500
    client.post("/interrupt", prompt_id=blocking)
    eventually(lambda: comfy.times_run()[twice["prompt_id"]] == 2)

    blocking = blocked()
    thrice = {"prompt_id": str(uuid.uuid4()), "number": 900}
    for color in range(3):
        client.post("/prompt", prompt=invert("c", color), **thrice)
    client.post("/interrupt", prompt_id=blocking)
    eventually(lambda: not comfy.worker.thread.is_alive())

    assert client.submit(invert("after")) in [item[1] for item in client.get("/queue")["queue_pending"]]
    assert comfy.times_run()[thrice["prompt_id"]] == 0


def test_ids_must_be_canonical_for_new_servers_only(tmp_path: Path) -> None:
    for version, status in zip(VERSIONS, (200, 400), strict=True):
        with comfyui(tmp_path / version, version=version) as comfy:
            client = Client(comfy)
            for id_ in ("not-a-uuid", str(uuid.uuid4()).upper(), uuid.uuid4().hex, "", 123):
                assert client.post("/prompt", prompt=invert(), prompt_id=id_).status_code == status, id_


def test_interrupts_hit_what_runs_and_are_always_answered_200(comfy: Comfy, client: Client) -> None:
    client.http.post("/interrupt")  # idle: forgotten
    with client.socket("me") as socket:
        first, second = (client.submit(invert(color=n, seconds=60), client_id="me") for n in (1, 2))
        eventually(lambda: client.running() == [first])
        assert client.post("/interrupt", prompt_id=second).status_code == 200
        assert client.post("/interrupt", prompt_id="unknown").status_code == 200
        assert client.running() == [first]

        client.post("/interrupt", prompt_id=first)
        until(socket, "execution_interrupted", prompt_id=first, node_id="2")
        until(socket, "executing", node=None, prompt_id=first)
        eventually(lambda: client.running() == [second])
        client.http.post("/interrupt")

    statuses = [client.ended(id_)["status"] for id_ in (first, second)]
    assert [(status["status_str"], status["messages"][-1][0]) for status in statuses] == [
        ("error", "execution_interrupted")
    ] * 2
    assert client.get(f"/api/jobs/{first}")["status"] == "cancelled"


def test_a_node_bound_in_c_hears_no_interrupt_until_it_ends(comfy: Comfy, client: Client) -> None:
    hang = comfy.fault("hang", seconds=60, times=1)
    hung = client.submit(invert("hung"))
    eventually(lambda: hang.struck)
    client.post("/interrupt", prompt_id=hung)
    assert client.running() == [hung]
    hang.seconds = 0
    assert client.ended(hung)["status"]["messages"][-1][0] == "execution_interrupted"

    hang = comfy.fault("hang", seconds=60, times=1, when=lambda run: len(run.executed) == 2)
    comfy.fault("ignore_interrupt", times=1)
    late = client.submit(invert("late"))
    eventually(lambda: hang.struck)
    assert client.post(f"/api/jobs/{late}/cancel").json() == {"cancelled": True}
    hang.seconds = 0
    assert client.ended(late)["status"]["completed"]


def test_jobs_are_cancelled_where_there_are_jobs(comfy: Comfy, client: Client, tmp_path: Path) -> None:
    running, *pending = (client.submit(invert(color=n, seconds=60)) for n in range(4))
    eventually(lambda: client.running() == [running])

    assert client.post("/queue", delete=[pending[0], running, "unknown"]).status_code == 200
    assert client.post(f"/api/jobs/{pending[1]}/cancel").json() == {"cancelled": True}
    assert client.post(f"/api/jobs/{pending[1]}/cancel").json() == {"cancelled": False}
    assert client.http.get(f"/api/jobs/{pending[1]}").status_code == 404
    assert client.post("/api/jobs/cancel", job_ids=["x"]).status_code == 400
    assert [job["id"] for job in client.get("/api/jobs?status=pending,in_progress")["jobs"]] == [pending[2], running]
    client.post("/queue", clear=True)
    assert client.get("/prompt") == {"exec_info": {"queue_remaining": 1}}

    with comfyui(tmp_path / "old", version=VERSIONS[0]) as old:
        assert httpx2.get(f"{old.url}/api/jobs").status_code == 404
        assert httpx2.post(f"{old.url}/api/jobs/x/cancel").status_code == 405


def test_a_second_socket_of_one_client_ends_deaf(client: Client) -> None:
    with client.socket("me") as old, client.socket("me") as new:
        first = client.submit(invert("a"), client_id="me")
        until(new, "executing", node=None, prompt_id=first)
        old.close()
        eventually(lambda: "me" not in client.comfy.sockets.by_id)

        client.rendered(invert("b"), client_id="me")

        with pytest.raises(TimeoutError):
            new.recv(timeout=0.1)


def test_a_late_socket_hears_of_the_node_and_nothing_of_before(client: Client) -> None:
    prompt_id = client.submit(invert(seconds=60), client_id="me")
    eventually(lambda: client.comfy.worker.last_node == "2")

    with client.socket("me") as socket:
        assert told(socket) == {"type": "executing", "data": {"node": "2"}}
        assert told(socket)["type"] == "progress_state"
    client.post("/interrupt", prompt_id=prompt_id)


def test_without_a_client_only_progress_and_the_queue_are_told_to_all(client: Client) -> None:
    with client.socket("bystander") as socket:
        client.rendered(invert())
        client.post("/queue", clear=True)
        types = {message["type"] for message in until(socket, "status")} | {told(socket)["type"] for _ in range(9)}

    assert types == {"status", "progress_state"}


def test_pictures_come_over_the_socket_as_binary(client: Client) -> None:
    graph = invert() | {"4": {"class_type": "SaveImageWebsocket", "inputs": {"images": ["2", 0]}}}
    with client.socket("me") as socket:
        client.submit(graph, client_id="me")
        frame: Any = ""
        while isinstance(frame, str):
            frame = socket.recv(timeout=30)

    assert frame[:16] == b"\0\0\0\1\0\0\0\2\x89PNG\r\n\x1a\n"


def test_a_cached_answer_names_a_file_that_is_gone_and_its_number_comes_again(comfy: Comfy, client: Client) -> None:
    first = client.rendered(invert())
    (comfy.files.of("output") / first["outputs"]["3"]["images"][0]["filename"]).unlink()

    cached = client.rendered(invert())
    assert client.http.get("/view", params=cached["outputs"]["3"]["images"][0]).status_code == 404
    assert comfy.runs[-1].executed == []
    other = client.rendered(invert(color=5))
    assert other["outputs"] == cached["outputs"]
    for prefix in ("new", "out"):  # the cache holds what the last graph had, no more
        client.rendered(invert(prefix, color=5))
        assert comfy.runs[-1].executed == ["3"]


def test_an_upload_keeps_both_pictures_and_new_bytes_run_again(comfy: Comfy, client: Client) -> None:
    def upload(color: str, **form: str) -> Any:
        content = io.BytesIO()
        Image.new("RGB", (8, 8), color).save(content, "PNG")
        answer = client.http.post("/upload/image", files={"image": ("in.png", content.getvalue())}, data=form)
        return answer.json() if answer.status_code == 200 else answer.status_code

    names = [upload("red"), upload("red"), upload("blue"), upload("red", subfolder="jobs/1")]
    graph = invert("up") | {"1": {"class_type": "LoadImage", "inputs": {"image": "in.png"}}}
    client.rendered(graph)
    upload("blue", overwrite="true")
    client.rendered(graph)

    assert [(each["name"], each["subfolder"]) for each in names] == [
        ("in.png", ""), ("in.png", ""), ("in (1).png", ""), ("in.png", "jobs/1"),
    ]  # fmt: skip
    assert comfy.runs[-1].executed == ["1", "2", "3"]
    assert client.get("/object_info/LoadImage")["LoadImage"]["input"]["required"]["image"][0] == [
        "in (1).png",
        "in.png",
    ]
    assert upload("red", subfolder="../..") == 400
    assert upload("red", type="bogus") == 500


def test_a_failed_run_tells_why_and_keeps_what_was_made(comfy: Comfy, client: Client) -> None:
    failing = invert() | {
        "5": {"class_type": "TestSyncError", "inputs": {"value": ["1", 0]}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "never"}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "made"}},
    }
    entry = client.rendered(failing)
    error = dict(entry["status"]["messages"])["execution_error"]
    assert (error["node_id"], error["exception_type"]) == ("5", "RuntimeError")
    assert "7" in entry["outputs"]
    assert entry["status"]["status_str"] == "error"

    comfy.fault("out_of_memory", times=1)
    full = dict(client.rendered(invert("oom"))["status"]["messages"])["execution_error"]
    assert full["exception_type"] == "torch.OutOfMemoryError"
    assert client.rendered(invert("/tmp/outside"))["status"]["messages"][-1][1]["exception_message"].startswith(
        "**** ERROR"
    )
    comfy.fault("no_output", times=1)
    nothing = client.rendered(invert("blocked"))
    assert (nothing["status"]["completed"], nothing["outputs"]) == (True, {})


def test_one_malformed_workflow_breaks_the_list_of_jobs_for_all(client: Client) -> None:
    client.rendered(invert(), extra_data={"extra_pnginfo": {"workflow": "no object"}})

    assert client.http.get("/api/jobs").status_code == 500
    assert client.post("/prompt", prompt=invert(), number="abc").status_code == 500
    assert client.http.post("/prompt", content=b"{oops").status_code == 500
    assert client.http.get("/queue", headers={"Origin": "http://evil.example"}).status_code == 403


def test_extra_data_comes_back_and_secrets_only_in_the_queue_of_old_servers(tmp_path: Path) -> None:
    for version in VERSIONS:
        with comfyui(tmp_path / version, version=version) as comfy:
            client = Client(comfy)
            id_ = client.submit(invert(seconds=60), extra_data={"job": "j1", "api_key_comfy_org": "SECRET"})
            eventually(client.running)
            assert ("SECRET" in json.dumps(client.get("/queue"))) == (version == "0.3.64")
            client.post("/interrupt", prompt_id=id_)

            assert client.ended(id_)["prompt"][3]["job"] == "j1"
            assert "SECRET" not in json.dumps(client.get("/history"))


def test_a_client_id_that_is_no_string_ends_the_server(comfy: Comfy, client: Client) -> None:
    with suppress(httpx2.HTTPError):  # its end may come before its answer
        client.submit(invert(), client_id={"a": 1})

    eventually(lambda: len(comfy.restarted_at) == 1)


@pytest.mark.parametrize(
    ("kind", "ran", "seen"),
    [
        ("lose_request", 0, None),
        ("fail_request", 0, 500),
        ("answer_500", 1, 500),
        ("lose_answer", 1, None),
        ("late_answer", 1, None),
    ],
)
def test_what_a_client_cannot_tell_apart(comfy: Comfy, client: Client, kind: str, ran: int, seen: int | None) -> None:
    comfy.fault(kind, path="/prompt", times=1, seconds=60)
    id_ = str(uuid.uuid4())
    status = None
    try:
        patience_s = 0.5 if kind == "late_answer" else 30
        answer = client.http.post("/prompt", json={"prompt": invert(), "prompt_id": id_}, timeout=patience_s)
        status = answer.status_code
    except httpx2.TransportError:
        client = Client(comfy)

    after = client.rendered(invert("after"))
    assert (status, comfy.times_run()[id_]) == (seen, ran)
    assert after["status"]["completed"]


def test_faults_of_sockets_runs_and_files(comfy: Comfy, client: Client) -> None:
    def fault_of(kind: str, act: Callable[[], Any], **how: Any) -> Any:
        fault = comfy.fault(kind, times=1, **how)
        result = act()
        assert fault.struck == 1, kind
        return result

    url = comfy.url.replace("http", "ws")

    def hears_nothing() -> None:
        with connect(f"{url}/ws?clientId=deaf", compression=None, proxy=None) as socket, pytest.raises(TimeoutError):
            socket.recv(timeout=0.1)

    def is_dropped() -> None:
        with client.socket("me") as socket:
            dropped = client.submit(invert("dropped"), client_id="me")
            with pytest.raises(ConnectionClosed):
                until(socket, "never")
        client.ended(dropped)  # the next fault is for the next run

    def is_cut() -> None:
        with pytest.raises(httpx2.TransportError):
            client.http.get("/system_stats")

    fault_of("deaf_socket", hears_nothing)
    fault_of("drop_socket", is_dropped)
    fault_of("cut", is_cut)
    fault_of("stall", lambda: client.get("/system_stats"), seconds=0.01)
    fault_of("trickle", lambda: client.get("/system_stats"), seconds=0.05)
    gone = fault_of("delete_outputs", lambda: client.rendered(invert("gone")))
    assert client.http.get("/view", params=gone["outputs"]["3"]["images"][0]).status_code == 404

    comfy.fault("lose_history", times=1)
    lost = client.submit(invert("lost"))
    client.rendered(invert("after"))
    assert client.get(f"/history/{lost}") == {}
    stuck = comfy.fault("stuck", times=1)
    waiting = client.submit(invert("stuck"))
    eventually(lambda: stuck.struck and not comfy.worker.thread.is_alive())
    assert client.get("/queue")["queue_pending"][0][1] == waiting
    comfy.restart()
    comfy.fault("restart", times=1)
    Client(comfy).submit(invert("restarted"))
    eventually(lambda: len(comfy.restarted_at) == 2)
    assert comfy.sockets.most >= 1
    assert comfy.requests["GET /history/{id}"] > 0


def test_the_graph_of_qwen_passes_and_samples_in_steps(comfy: Comfy, client: Client) -> None:
    Image.new("RGB", (8, 8), "red").save(comfy.files.of("input") / "in.png")
    loaders = {
        "37": ("UNETLoader", {"unet_name": "qwen_image_edit_2509_fp8_e4m3fn.safetensors", "weight_dtype": "default"}),
        "39": ("VAELoader", {"vae_name": "qwen_image_vae.safetensors"}),
        "78": ("LoadImage", {"image": "in.png"}),
        "38": ("CLIPLoader", {"clip_name": "qwen_2.5_vl_7b_fp8_scaled.safetensors", "type": "qwen_image"}),
        "111": (
            "TextEncodeQwenImageEditPlus",
            {"clip": ["38", 0], "vae": ["39", 0], "image1": ["78", 0], "prompt": "snow"},
        ),
        "88": ("VAEEncode", {"pixels": ["78", 0], "vae": ["39", 0]}),
    }
    sampler = {"seed": 42, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    links = {"model": ["37", 0], "positive": ["111", 0], "negative": ["111", 0], "latent_image": ["88", 0]}
    nodes = loaders | {
        "3": ("KSampler", {**sampler, **links}),
        "8": ("VAEDecode", {"samples": ["3", 0], "vae": ["39", 0]}),
        "60": ("SaveImage", {"images": ["8", 0], "filename_prefix": "qwen"}),
    }
    graph = {id_: {"class_type": class_type, "inputs": inputs} for id_, (class_type, inputs) in nodes.items()}
    missing = client.post("/prompt", prompt=graph).json()
    assert {"37", "38", "39"} == set(missing["node_errors"])

    comfy.with_qwen()
    comfy.durations = {"KSampler": 0.5}
    with client.socket("me") as socket:
        client.submit(graph, client_id="me")
        messages = until(socket, "executed", node="60")

    steps = [(each["data"]["value"], each["data"]["max"]) for each in messages if each["type"] == "progress"]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
