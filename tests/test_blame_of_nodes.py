"""Which node a complaint is of. (The rest: tests/slurm/test_preflight.py.)"""

from pipeline.preflight import _why

NODES = ["n1", "n2", "n3"]


def test_a_complaint_is_of_the_node_whose_process_made_it():
    padded = [" 3: NCCL error on n1's side", " 4: no route to host", "11: the last", "srun: error: n2: task 4: Exited"]
    assert _why(0, NODES, 4, padded) == "NCCL error on n1's side"
    assert _why(1, NODES, 4, padded) == "no route to host"
    assert _why(2, NODES, 4, padded) == "the last"
    assert _why(1, NODES, 1, ["1: first", "1: then", "2: other"]) == "then"


def test_of_a_node_whose_processes_say_nothing_srun_may():
    complaints = ["0: fine", "srun: error: n2: task 1: Exited with exit code 127", "srun: error: aborted"]
    assert _why(1, NODES, 1, complaints) == "srun: error: n2: task 1: Exited with exit code 127"
    assert _why(2, NODES, 1, complaints) == "srun: error: aborted"
    assert _why(2, NODES, 1, []) == "it says nothing"
