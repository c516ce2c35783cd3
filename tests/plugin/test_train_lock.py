import threading
import time

from lrf_nerfstudio.plugin.trainer import FairLock


def test_who_waits_is_next():
    """A thread that takes the lock again at once lets another one in each time that it waits."""
    lock, turns, stop = FairLock(), [], threading.Event()

    def greedy() -> None:
        while not stop.is_set():
            with lock:
                turns.append("greedy")
                time.sleep(0.01)

    thread = threading.Thread(target=greedy)
    thread.start()
    try:
        for _ in range(20):
            while not turns or turns[-1] == "modest":
                time.sleep(0.001)  # until the greedy thread has it
            asked = len(turns)
            with lock:
                assert len(turns) - asked <= 1
                turns.append("modest")
    finally:
        stop.set()
        thread.join()


def test_one_thread_at_a_time():
    lock, inside, most = FairLock(), [], []

    def work() -> None:
        for _ in range(50):
            with lock:
                inside.append(0)
                most.append(len(inside))
                time.sleep(0.0001)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 200 and max(most) == 1
