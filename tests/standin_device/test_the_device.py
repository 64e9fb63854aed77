"""The stand-in device refuses what a GPU refuses, is late where a GPU may be, and computes what the CPU computes."""

from __future__ import annotations

import copy
import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import ROOT

GIVEN = torch.arange(12.0).view(3, 4)


@pytest.fixture
def standin() -> Iterator[Any]:
    """The device's module, as it was before when the test is over."""
    module = torch.get_device_module("standin")
    lazy, checked, limit = module.set_lazy(False), module.set_checked(False), module.set_memory_limit(1 << 30)
    yield module
    for device in range(module.device_count()):
        module.synchronize(device)
    module.set_lazy(lazy)
    module.set_checked(checked)
    module.set_memory_limit(limit)


def there(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("standin")


@pytest.mark.parametrize(
    "mixed",
    [
        lambda: there(GIVEN) + GIVEN,
        lambda: F.linear(there(GIVEN), GIVEN),
        lambda: F.linear(there(GIVEN), there(GIVEN), torch.zeros(3)),
        lambda: F.embedding(torch.tensor([0]), there(GIVEN)),
        lambda: there(GIVEN).index_select(0, torch.tensor([0])),
        lambda: torch.cat([there(GIVEN), GIVEN]),
        lambda: there(GIVEN) + GIVEN.to("standin:1"),
    ],
)
def test_what_lies_on_two_devices_is_not_computed(standin: Any, mixed: Callable[[], torch.Tensor]) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        mixed()


def test_numbers_and_indices_in_brackets_may_lie_on_the_host(standin: Any) -> None:
    assert torch.equal((there(GIVEN) + torch.tensor(1.0)).cpu(), GIVEN + 1)
    assert torch.equal(there(GIVEN)[torch.tensor([2, 0])].cpu(), GIVEN[[2, 0]])


def test_the_host_cannot_touch_its_memory(standin: Any) -> None:
    """The kernel, asked to do so, says it; a process that does so itself is killed."""
    memory = (ctypes.c_char * 4).from_address(there(GIVEN).data_ptr())
    source, sink = os.pipe()
    with pytest.raises(OSError, match="Bad address"):
        os.write(sink, memory)
    os.write(sink, b"four")
    with pytest.raises(OSError, match="Bad address"):
        os.readv(source, [memory])
    os.close(source)
    os.close(sink)


def waits_for_event(standin: Any, stream: torch.Stream) -> None:
    event = standin.Event()
    event.record(stream)
    standin.current_stream().wait_event(event)


@pytest.mark.parametrize(
    "wait",
    [
        waits_for_event,
        lambda standin, stream: stream.record_event().synchronize(),
        lambda standin, stream: standin.current_stream().wait_stream(stream),
        lambda standin, stream: stream.synchronize(),
        lambda standin, stream: standin.synchronize(),
    ],
)
def test_a_late_copy_must_be_waited_for(standin: Any, wait: Callable[[Any, torch.Stream], None]) -> None:
    target, source, stream = torch.zeros(3, 4, device="standin"), GIVEN.pin_memory(), standin.Stream()
    standin.set_lazy(True)
    with standin.stream(stream):
        target.copy_(source, non_blocking=True)
    assert standin.late_copies() == 1
    assert not stream.query()
    assert torch.equal((target + 1).cpu(), torch.ones(3, 4))
    wait(standin, stream)
    assert torch.equal((target + 1).cpu(), GIVEN + 1)
    assert standin.late_copies() == 0
    assert stream.query()


def test_a_late_copy_is_done_where_its_stream_goes_on(standin: Any) -> None:
    standin.set_lazy(True)
    assert torch.equal((GIVEN.pin_memory().to("standin", non_blocking=True) + 1).cpu(), GIVEN + 1)


def test_a_late_copy_to_the_host_must_be_waited_for(standin: Any) -> None:
    source, target = there(GIVEN), torch.zeros(3, 4, pin_memory=True)
    standin.set_lazy(True)
    target.copy_(source, non_blocking=True)
    event = standin.current_stream().record_event()
    assert not event.query()
    assert torch.equal(target, torch.zeros(3, 4))
    event.synchronize()
    assert torch.equal(target, GIVEN)


def test_what_is_overwritten_before_a_late_copy_is_done_shows(standin: Any) -> None:
    """Its source on the host, its source on the device, and its target on the device."""
    standin.set_lazy(True)
    stream, pinned, zeros = standin.Stream(), GIVEN.pin_memory(), torch.zeros(3, 4, device="standin")
    with standin.stream(stream):
        on_device = torch.empty_like(zeros).copy_(pinned, non_blocking=True)
    pinned.zero_()
    stream.synchronize()
    assert torch.equal(on_device.cpu(), torch.zeros(3, 4))

    with standin.stream(stream):
        pinned.copy_(on_device, non_blocking=True)
    on_device.fill_(1)
    stream.synchronize()
    assert torch.equal(pinned, torch.ones(3, 4))

    with standin.stream(stream):
        on_device.copy_(pinned, non_blocking=True)
    on_device.fill_(2)
    stream.synchronize()
    assert torch.equal(on_device.cpu(), torch.ones(3, 4))


@pytest.mark.parametrize("source", [GIVEN, GIVEN.t().contiguous().t().pin_memory(), GIVEN.pin_memory().double()])
def test_copies_that_torch_does_on_the_host_are_not_late(standin: Any, source: torch.Tensor) -> None:
    standin.set_lazy(True)
    torch.zeros(3, 4, device="standin").copy_(source, non_blocking=True)
    assert standin.late_copies() == 0


# --- races


@pytest.fixture
def checked(standin: Any) -> Any:
    standin.set_checked(True)
    return standin


def test_a_copy_over_what_a_kernel_reads_must_wait_for_it(checked: Any) -> None:
    memory, source, ids = there(GIVEN), GIVEN.pin_memory(), there(torch.tensor([1]))
    main, side = checked.current_stream(), checked.Stream()
    checked.synchronize()
    race = f"race: copy_ on stream {side.stream_id}, which writes .* not ordered after aten::index_select on stream 0, "
    for _ in range(2):  # the second time, what was marked before the kernel does not help
        memory.index_select(0, ids)
        with checked.stream(side):
            with pytest.raises(RuntimeError, match=race):
                memory.copy_(source, non_blocking=True)
            side.wait_event(main.record_event())
            memory.copy_(source, non_blocking=True)
        with pytest.raises(RuntimeError, match=r"which reads memory, is not ordered after copy_ .*, which writes it"):
            memory.index_select(0, ids)
        main.wait_stream(side)


@pytest.mark.parametrize(
    "write",
    [
        lambda memory: memory.add_(1),
        lambda memory: torch.add(memory, 1, out=memory),
        lambda memory: memory + 1,
        lambda memory: memory.sort()[1],
        lambda memory: memory.frexp()[0],
        lambda memory: F.conv1d(memory[:, :3], torch.ones(3, 3, 1, device=memory.device)),
    ],
)
def test_what_a_kernel_writes_must_be_waited_for(checked: Any, write: Callable[[torch.Tensor], torch.Tensor]) -> None:
    given, main, side = there(GIVEN), checked.current_stream(), checked.Stream()
    written = write(given)
    target = torch.empty_like(written, device="cpu", pin_memory=True)
    uses: list[Callable[[], object]] = [
        lambda: target.copy_(written, non_blocking=True),
        lambda: written.copy_(target, non_blocking=True),
        lambda: written + 1,
        lambda: torch.cat([written]),
        lambda: written.cpu(),
    ]
    with checked.stream(side):
        for use in uses:
            with pytest.raises(RuntimeError, match=r"race: .* on stream 0, which writes it"):
                use()
        side.wait_stream(main)
        for use in uses:
            use()


@pytest.mark.parametrize(
    ("wait", "is_enough"),
    [
        (lambda standin, stream, x: None, False),
        (lambda standin, stream, x: stream.synchronize(), True),
        (lambda standin, stream, x: standin.synchronize(), True),
        (lambda standin, stream, x: stream.record_event().synchronize(), True),
        (lambda standin, stream, x: x.cpu(), True),
        (lambda standin, stream, x: x.sum().item(), True),
        (lambda standin, stream, x: x.nonzero(), True),
        (lambda standin, stream, x: torch.empty(3, 4).copy_(x, non_blocking=True), True),  # not pinned
        (lambda standin, stream, x: x.to("cpu", non_blocking=True), False),  # torch pins what it makes
        (lambda standin, stream, x: torch.empty(3, 4, pin_memory=True).copy_(x, non_blocking=True), False),
        (lambda standin, stream, x: x + 1, False),
        (lambda standin, stream, x: there(GIVEN), False),  # what is small, CUDA takes without waiting
        (lambda standin, stream, x: standin.synchronize(1), False),
    ],
)
def test_who_waits_on_the_host_is_in_order(checked: Any, wait: Callable[..., object], is_enough: bool) -> None:
    memory, main, side = there(GIVEN), checked.current_stream(), checked.Stream()
    memory + 1
    wait(checked, main, memory)
    with checked.stream(side):
        if not is_enough:
            with pytest.raises(RuntimeError, match="race: "):
                memory.zero_()
            main.synchronize()
        memory.zero_()


def test_order_goes_on_from_stream_to_stream(checked: Any) -> None:
    memory, main, side, third = there(GIVEN), checked.current_stream(), checked.Stream(), checked.Stream()
    side.wait_stream(main)
    with checked.stream(side):
        memory + 1
    main.wait_stream(side)
    memory + 1  # so that only this read has to be waited for
    third.wait_event(main.record_event())
    with checked.stream(third):
        memory.zero_()
    checked.set_device(0)
    elsewhere = torch.zeros(3, 4, device="standin:1")
    main.wait_stream(third)
    elsewhere.copy_(memory)  # the streams of both devices wait
    memory.zero_()
    elsewhere.zero_()


def test_other_bytes_may_be_used_at_the_same_time(checked: Any) -> None:
    memory, source, side = there(torch.zeros(4, 6)), torch.ones(6, pin_memory=True), checked.Stream()
    checked.synchronize()
    for slot in (0, 1, 3):
        with checked.stream(side):
            memory[slot].copy_(source, non_blocking=True)
        memory[2].add_(1)
    for part in (memory[1, 5:], memory[::2, 5]):  # the latter lies around what is copied
        with pytest.raises(RuntimeError, match="race: "):
            part + 1
    with checked.stream(side), pytest.raises(RuntimeError, match="race: "):
        memory[2, 5:].zero_()


def test_freed_memory_has_no_past(checked: Any) -> None:
    side, places = checked.Stream(), set[int]()
    for _ in range(5):
        memory = torch.zeros(1 << 20, device="standin")
        places.add(memory.data_ptr())
        del memory
        with checked.stream(side):
            memory = torch.ones(1 << 20, device="standin")
            places.add(memory.data_ptr())
            del memory
    assert len(places) < 10, "no place was used again: this tests nothing"


def test_races_are_no_errors_unless_asked_for(checked: Any) -> None:
    memory, side = there(GIVEN), checked.Stream()
    assert checked.set_checked(False)
    with checked.stream(side):
        memory.zero_()
    assert not checked.set_checked(True)
    memory.zero_()
    with checked.stream(side), pytest.raises(RuntimeError, match="race: "):
        memory.zero_()


def test_memory_of_others_counts_as_pinned(standin: Any) -> None:
    pages = torch.frombuffer(mmap.mmap(-1, 1 << 16), dtype=torch.uint8)
    target = torch.zeros(100, dtype=torch.uint8, device="standin")
    assert not pages.is_pinned()
    standin.register_pinned(pages.data_ptr(), pages.nbytes)
    assert pages[-1:].is_pinned()
    with pytest.raises(RuntimeError, match="already"):
        standin.register_pinned(pages.data_ptr() + 4096, 4096)
    standin.set_lazy(True)
    target.copy_(pages[50:150].fill_(7), non_blocking=True)
    with pytest.raises(RuntimeError, match="still uses"):
        standin.unregister_pinned(pages.data_ptr())
    assert target.sum().item() == 700
    standin.unregister_pinned(pages.data_ptr())
    assert not pages.is_pinned()
    with pytest.raises(RuntimeError, match="not been registered"):
        standin.unregister_pinned(pages.data_ptr())


def test_its_memory_ends(standin: Any) -> None:
    standin.set_memory_limit(1 << 20)
    free, before = standin.mem_get_info(1)[0], standin.memory_allocated(1)
    half = torch.empty(1 << 19, dtype=torch.uint8, device="standin:1")
    assert standin.memory_allocated(1) == before + half.nbytes
    assert standin.mem_get_info(torch.device("standin:1")) == (free - half.nbytes, 1 << 20)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 524289 bytes on standin:1"):
        torch.empty((1 << 19) + 1, dtype=torch.uint8, device="standin:1")
    del half
    assert standin.memory_allocated(1) == before
    assert standin.max_memory_allocated(1) >= before + (1 << 19)
    standin.reset_peak_memory_stats(1)
    assert standin.max_memory_allocated(1) == before


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 5e-3)], ids=str)
def test_it_computes_what_the_cpu_computes(standin: Any, dtype: torch.dtype, near: float) -> None:
    """Norms and attention are put together from other operators, which round otherwise than the CPU's."""

    def compute(device: str) -> tuple[torch.Tensor, torch.Tensor]:
        x = GIVEN.clone().to(device, dtype)
        ids = torch.tensor([2, 0], device=device)
        with torch.autocast(x.device.type, enabled=False):
            x = F.embedding(ids, x.index_copy_(0, ids, F.linear(x, x).index_select(0, ids) @ x))
        normed = F.rms_norm(F.layer_norm(x, (4,)), (4,)).view(1, 1, 2, 4)
        return x.cpu(), F.scaled_dot_product_attention(normed, normed, normed, is_causal=True).cpu()

    (here, normed_here), (on_cpu, normed_on_cpu) = compute("standin:1"), compute("cpu")
    assert torch.equal(here, on_cpu)
    torch.testing.assert_close(normed_here, normed_on_cpu, atol=near, rtol=0)


def test_tensors_can_be_copied_viewed_and_saved(standin: Any, tmp_path: Path) -> None:
    made = there(GIVEN.to(torch.float8_e4m3fn))
    assert torch.equal(made.view(torch.uint8).cpu(), GIVEN.to(torch.float8_e4m3fn).view(torch.uint8))
    assert copy.deepcopy(made).device == torch.device("standin:0")
    layer = copy.deepcopy(torch.nn.Linear(4, 3, device="standin:1"))
    save_file(layer.state_dict(), tmp_path / "saved.safetensors")
    assert torch.equal(load_file(tmp_path / "saved.safetensors")["weight"], layer.weight.cpu())


@pytest.mark.parametrize("sample", [False, True])
def test_a_model_generates_what_it_generates_on_the_cpu(standin: Any, sample: bool) -> None:
    def generate(device: str) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(ROOT / "examples" / "tiny-llama", device_map=device)
        assert {parameter.device for parameter in model.parameters()} == {torch.device(device)}
        torch.manual_seed(0)
        ids = torch.tensor([[5, 6, 7]], device=device)
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=sample).cpu()

    standin.set_lazy(True)
    assert torch.equal(generate("standin:1"), generate("cpu"))
