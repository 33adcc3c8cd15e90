"""What ranks print: tries are parted, and only the ends of logs are read."""

from pipeline.launch.output import begin_try, heading, newest_try, tail


def test_a_try_begins_on_a_line_of_its_own(tmp_path):
    log = tmp_path / "rank.log"
    assert newest_try(log) == []
    begin_try(log, heading(1))
    assert newest_try(log) == []
    with log.open("a") as file:
        file.write("first\nsecond, cut")
    assert newest_try(log) == ["first", "second, cut"]
    begin_try(log, heading(2))
    assert newest_try(log) == []
    with log.open("a") as file:
        file.write("third")
    assert newest_try(log) == ["third"]
    lines = log.read_text().splitlines()
    assert [line.startswith("--- try ") for line in lines] == [True, False, False, True, False]


def test_of_a_long_log_only_the_end_is_read(tmp_path):
    log = tmp_path / "rank.log"
    log.write_text(heading(1) + "\n" + "".join(f"line {number}\n" for number in range(10_000)))
    assert newest_try(log, 100) == [f"line {number}" for number in range(9991, 10_000)]
    assert tail(log, 100).startswith("line 9991\n")


def test_the_end_of_a_line_longer_than_that_is_kept(tmp_path):
    log = tmp_path / "rank.log"
    log.write_text("\r".join(f"{number} %" for number in range(101)))
    assert newest_try(log, 10)[-1] == "100 %"


def test_what_is_no_text_is_read_all_the_same(tmp_path):
    log = tmp_path / "rank.log"
    log.write_bytes(b"\xff\xfe\nerror: \x00\n")
    assert newest_try(log) == ["\ufffd\ufffd", "error: \x00"]
