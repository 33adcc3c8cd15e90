"""What bad input gets: one clear line, the right exit status, nothing half-written."""

import json
import os
import shutil
import subprocess

import pytest
from support import MODEL_TASKS, PROJECT, command, run_command, run_pipeline

from pipeline.errors import ConfigError


def refused(tmp_path, *arguments, status) -> str:
    """Run a command line that must be refused; nothing may be published. Returns what it says."""
    done = run_pipeline(*arguments, f"root={tmp_path / 'artifacts'}", status=status)
    assert not list((tmp_path / "artifacts").rglob("manifest.json"))
    assert all(line.startswith("error: ") for line in done.stderr.splitlines()), done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do: say job=NAME or stage=KIND"),
        (["job=tiny", "stage=dedup", "stage.corpus=x"], "say either job=NAME or stage=KIND"),
        (["stage=tokenise"], "stage: no stage is called 'tokenise'; did you mean 'tokenize'?"),
        (["job=quickstat"], "job: no job is called 'quickstat'; did you mean 'quickstart'?"),
        (["tracker=wandbb", "job=tiny"], "tracker: no tracker is called 'wandbb'; did you mean 'wandb'?"),
        (["job=tiny", "rnu.ranks=2"], "rnu: no such setting; did you mean 'run'?"),
        (["job=tiny", "run.rank=2"], "run.rank: no such setting; did you mean 'ranks'?"),
        (["job=tiny", "run.ranks=0"], "run.ranks: wanted greater than or equal to 1, found 0"),
        (["job=tiny", "tasks.pretrain.steps=many"], "tasks.pretrain.steps: wanted an integer, found 'many'"),
        (["job=tiny", "tasks.pretrain.stps=3"], "tasks.pretrain.stps: no such setting; did you mean 'steps'?"),
        (["job=tiny", "tasks.tokenize.kind=tokenise"], "tasks.tokenize.kind: no stage is called 'tokenise'"),
        (["job=tiny", "tasks.tokenize.corpus=@dedupe"], "corpus: no task is called 'dedupe'; did you mean 'dedup'?"),
        (["job=tiny", "tasks.tokenize.corpus=@pretrain"], "wanted an artifact of kind corpus, but task 'pretrain'"),
        (["job=tiny", "tasks.clean.corpus=@dedup"], "these need one another, so none can be first: "),
        (["job=tiny", "tasks.pretrain.seq_len=128"], "seq_len: 128 is longer than the model's max_seq_len of 64"),
        (["job=tiny", "tasks.finetune.seq_len=65"], "tasks.finetune.seq_len: 65 is longer than the model's"),
        (["job=tiny", "tasks.pretrain.batch_tokens=500"], "500 does not divide into sequences of 32 tokens"),
        (["job=tiny", "run.ranks=3"], "a batch of 16 rows does not divide among 3 data-parallel ranks"),
        (["job=tiny", "tasks.pretrain.model.num_heads=5"], "d_model (32) must be a multiple of num_heads (5)"),
        (
            ["job=tiny", "tasks.generate.model=@finetune"],
            "tasks.generate.model: wanted a language model, but fine-tuning",
        ),
        (
            ["job=tiny", "tasks.evaluate.model=@finetune"],
            "tasks.evaluate.model: wanted a language model, but fine-tuning",
        ),
        (["job=tiny", "tasks.pretrain.model.norm=layernorm"], "no Hugging Face layout computes this model"),
        (["job=tiny", "tasks.pretrain.steps=[1"], "command line: "),
        (["job=tiny", "run=null"], "command line: Config group override must be"),
        (["job=tiny", "tasks.pretrain.optimizer.lr=inf"], "tasks.pretrain.optimizer.lr: wanted a finite number"),
        (
            ["job=tiny", "tasks.pretrain.average.decay=0.9"],
            "tasks.pretrain.average.kind: missing; say which kind: ema or last",
        ),
        (
            ["job=tiny", "tasks.pretrain.schedule.warmup=0.1"],
            "schedule.warmup: no such setting of kind 'linear', the default; there is final_fraction, ",
        ),
        (["job=tiny", "tasks.generate.prompt=42"], "tasks.generate.prompt: wanted a valid array, found 42"),
        (["job=tiny", "tasks.generate.prompt=[]"], "tasks.generate.prompt: value should have at least 1 item"),
        (
            ["job=tiny", "run.parallel.deepspeed={train_batch_size: 3}"],
            "deepspeed.train_batch_size: contradicts a typed",
        ),
        (["job=headless"], "jobs/headless.yaml: its first line must be '# @package _global_'"),
        (["job=broken"], "command line: "),
        (["job=empty"], "tasks: the job has none"),
        (["--foo", "job=tiny"], "--foo: no such flag; did you mean '--info'?"),
        (["job=tiny", "--dry-run"], "--dry-run: no such flag; did you mean '--plan'?"),
        (["--job=tiny"], "--job: no such flag; did you mean 'job=NAME'?"),
        (["job=tiny", "nodes=2"], "nodes: no such setting; did you mean 'run.nodes'?"),
        (["job=tiny", "run=slurm", "tiny"], "missing EQUAL at '<EOF>'; wanted KEY=VALUE"),
        (["job=tiny", "run=slurm", "run.flags=[--a=b]"], "goes into quotes of its own: "),
        (["job=tiny", "name=a.b"], "name: wanted a name of up to 64 letters, digits, _ and -, found 'a.b'"),
        (["name=x"], "nothing to do: say job=NAME or stage=KIND"),
        (["job=tiny", "tasks.pretrain.steps=${nope}"], "command line: "),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_runs(tmp_path, arguments, message):
    said = refused(tmp_path, *arguments, status=2)
    assert message in said
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["job=tiny", "--cfg", "job", "tasks.pretrain.steps=7"], "steps: 7"),
        (["job=tiny", "--plan", "tasks.pretrain.steps=7"], "nothing was started"),
        (["tasks.pretrain.steps=7,8", "-m", "job=tiny", "--plan"], "nothing was started"),
        (["job=tiny", "root=~/of-nobody/artifacts", "--plan"], "/of-nobody/artifacts/corpus"),
    ],
)
def test_words_may_come_in_any_order(tmp_path, arguments, says):
    assert says in run_pipeline(f"root={tmp_path}", *arguments).stdout


@pytest.mark.parametrize("name", ["mine.yaml", "äö, ü/mine.yaml", "äö.v1.yaml", "quickstart.yaml"])
def test_a_job_may_be_a_file_anywhere(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    shutil.copy(PROJECT / "tests/conf/job/tiny.yaml", path)
    for said in (path, f"'{path}'"):
        done = run_pipeline(
            f"job={said}", f"root={tmp_path}/artifacts", "tasks.pretrain.steps=7", "run=slurm", "--plan"
        )
        assert "11 of 11 tasks would run" in done.stdout
        assert f"--job-name={path.stem}.pretrain" in done.stdout


def test_a_cluster_may_be_a_file_anywhere(tmp_path):
    (tmp_path / "slurm.yaml").write_text("defaults: [slurm, _self_]\naccount: mine\n")
    done = run_pipeline("job=tiny", f"run={tmp_path}/slurm.yaml", "run.nodes=2", f"root={tmp_path}/artifacts", "--plan")
    assert "--account=mine --nodes=2 " in done.stdout


def test_a_cluster_that_does_not_say_what_it_is_is_refused_with_all_that_is_wrong(tmp_path):
    (tmp_path / "site.yaml").write_text("account: mine\nnodez: 2\n")
    said = refused(tmp_path, "job=tiny", f"run={tmp_path}/site.yaml", "tasks.pretrain.stps=3", status=2)
    assert said.splitlines() == [
        f"error: run: {tmp_path}/site.yaml: does not say whether it is for slurm or local; begin it with "
        "'defaults: [slurm, _self_]'",
        "error: tasks.pretrain.stps: no such setting; did you mean 'steps'?",
        "error: run.nodez: no such setting; did you mean 'nodes'?",
    ]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("job=yours.yaml", "job: yours.yaml: no such file"),
        ("job={}/mine", "job: {0}/mine: a path has to end in .yaml; there is {0}/mine.yaml"),
        ("run={}/mine", "run: {0}/mine: a path has to end in .yaml; there is {0}/mine.yaml"),
        ("run={}/site", "run: no run is called '{}/site'; there is a100, "),
        ("job={}/a job.yaml", "job: {}/a job.yaml: a job is called as its file; wanted a name of up to 64 letters, "),
    ],
)
def test_a_file_that_cannot_be_taken_is_named(tmp_path, word, message):
    for name in ("mine.yaml", "a job.yaml"):
        (tmp_path / name).touch()
    said = refused(tmp_path, word.format(tmp_path), "--plan", status=2)
    assert said.startswith(f"error: {message.format(tmp_path)}")


@pytest.mark.parametrize("words", [["job=tiny", "--plan"], ["--help"], ["status", "--help"], ["stage=clean", "--help"]])
def test_a_reader_that_reads_no_further_is_no_error(tmp_path, words):
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        command(*words) if "=" in words[0] else [*command()[:3], *words],
        cwd=PROJECT,
        stdout=writes,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tiny", "no command is called 'tiny' (a job is run by job=NAME); there is cancel, "),
        ("quickstart", "no command is called 'quickstart' (a job is run by job=NAME); did you mean 'job=quickstart'?"),
        ("README.md", "did you mean 'job=README.md'?"),
        ("statu", "no command is called 'statu' (a job is run by job=NAME); did you mean 'status'?"),
    ],
)
def test_a_word_that_is_no_command_is_answered_with_the_nearest(word, message):
    assert message in run_command(word, status=2).stderr


def test_a_module_that_is_missing_in_a_job_by_hand_is_answered_with_what_that_reads(monkeypatch):
    from pipeline.__main__ import _explained

    missing = ModuleNotFoundError(name="xxhash")
    monkeypatch.setenv("PIPELINE_ALLOCATION", "7")
    monkeypatch.setattr("sys.argv", ["pipeline", "job=tiny", "run=slurm"])
    assert "PIPELINE_SETUP or PIPELINE_PYTHON says where a node has it" in str(_explained(missing))
    monkeypatch.setattr("sys.argv", ["pipeline", "task", "artifacts/x"])
    assert "run.setup or run.python says where a node has it" in str(_explained(missing))


def test_a_mistyped_task_is_answered_with_the_right_one(tmp_path):
    said = refused(tmp_path, "job=tiny", "tasks.pretrian.steps=3", status=2)
    assert said == "error: tasks.pretrian: no task is called 'pretrian'; did you mean 'pretrain'?\n"


def test_the_settings_of_a_stage_are_listed_with_their_defaults():
    said = run_pipeline("stage=finetune", "--help").stdout
    assert "trunk" in said
    assert "full | frozen" in said
    assert "lr" in said  # of the optimizer that it holds
    assert "gpus_per_node" in run_pipeline("run=slurm", "--help").stdout
    assert "did you mean 'clean'?" in run_pipeline("stage=claen", "--help", status=2).stderr


def test_a_tracker_that_is_not_installed_is_said_before_anything_runs(monkeypatch):
    from pipeline.plan import Command, plan
    from pipeline.settings import decode

    monkeypatch.setattr("pipeline.plan.find_spec", lambda name: None)  # the tests have it installed
    with pytest.raises(ConfigError, match=r"tensorboard is not installed; pip install -e '.\[tensorboard\]' brings it"):
        plan(decode(Command, {"tracker": {"kind": "tensorboard"}, "stage": {"kind": "dedup", "corpus": "x"}}), None)


@pytest.mark.parametrize("root", ["/etc/passwd", "/dev/null/x", "/proc/x"])
def test_a_root_that_cannot_be_used_is_named(root):
    done = run_pipeline("stage=shard", "stage.sources=[{path: tests/data/mini.jsonl}]", f"root={root}", status=3)
    assert done.stderr.startswith(f"error: {root}")
    assert "root=DIR chooses another place" in done.stderr


def test_all_mistakes_are_listed(tmp_path):
    said = refused(
        tmp_path, "job=tiny", "tasks.pretrain.stps=3", "tasks.clean.corpse=x", "run.ranks=two", "rot=x", status=2
    )
    assert len(said.splitlines()) == 4


def test_references_of_several_tasks_are_listed_together(tmp_path):
    said = refused(tmp_path, "job=tiny", "tasks.clean.corpus=@shrd", "tasks.export.model=@dedup", status=2)
    assert len(said.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["stage=clean", "stage.corpus=nowhere"],
            "stage.corpus: nowhere: no such directory; wanted an",
        ),
        (["stage=clean", "stage.corpus=tests"], "has no manifest.json, so it is not an artifact"),
        (["job=tiny", "tasks.shard.sources.0.path=nowhere.jsonl"], "nowhere.jsonl: no such file or directory"),
        (["job=tiny", "tasks.finetune.data=nowhere.jsonl"], "nowhere.jsonl: no such file or directory"),
    ],
)
def test_a_missing_input_is_named(tmp_path, arguments, message):
    arguments = [a.replace("sources.0.path=", "sources=[{path: ") + "}]" if "sources.0" in a else a for a in arguments]
    assert message in refused(tmp_path, *arguments, status=3)


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    said = refused(tmp_path, "stage=shard", f"stage.sources=[{{path: {tmp_path}/empty.jsonl}}]", status=3)
    assert "empty.jsonl" in said


def test_too_little_disk_is_said_before_the_work(tmp_path, monkeypatch, capsys):
    import shutil as module

    from pipeline.__main__ import act

    source = tmp_path / "text.jsonl"
    usage = module.disk_usage("/")
    monkeypatch.setattr(module, "disk_usage", lambda path: usage._replace(free=1000))  # a small disk cannot be had
    source.write_text('{"text": "' + "word " * 1000 + '"}\n')
    data = {
        "root": str(tmp_path / "artifacts"),
        "stage": {"kind": "shard", "sources": [{"path": str(source)}]},
    }
    assert act(data, None) == 3
    assert "0.001 MB free; make room or choose another root=DIR" in capsys.readouterr().err
    assert not list((tmp_path / "artifacts").rglob("*.arrow"))


@pytest.mark.slow
@pytest.mark.xdist_group("tiny")
class TestWithAJob:
    """Inputs made by a real job, then spoiled."""

    @pytest.fixture
    def jobs(self, tiny_root, tmp_path):
        shutil.copytree(tiny_root, tmp_path / "copy", symlinks=True)
        return tmp_path / "copy/jobs/tiny"

    def test_an_artifact_of_the_wrong_kind(self, jobs, tmp_path):
        said = refused(tmp_path, "stage=clean", f"stage.corpus={jobs}/tokenize", status=3)
        assert "wanted an artifact of kind corpus, found one of kind 'tokens'" in said

    def test_a_damaged_part(self, jobs, tmp_path):
        part = next((jobs / "dedup").resolve().glob("part-*.arrow"))
        data = bytearray(part.read_bytes())
        data[len(data) // 2] ^= 1
        part.write_bytes(data)
        said = refused(
            tmp_path,
            "stage=tokenize",
            f"stage.corpus={jobs}/dedup",
            f"stage.tokenizer={jobs}/train_tokenizer",
            status=3,
        )
        assert f"{part.name}: damaged: wanted" in said
        assert "run the task that made it again" in said

    def test_a_cut_part_of_a_finished_job(self, jobs):
        part = next((jobs / "tokenize").resolve().glob("part-*.arrow"))
        os.truncate(part, 100)
        done = run_pipeline("job=tiny", f"root={jobs.parent.parent}", status=3)
        assert f"{part.name}: damaged: wanted" in done.stderr

    def test_a_vocabulary_that_does_not_match_the_tokens(self, jobs, tmp_path):
        root = jobs.parent.parent
        run_pipeline(
            "job=tiny",
            f"root={root}",
            "tasks.train_tokenizer.vocab_size=300",
            *(f"~tasks.{task}" for task in (*MODEL_TASKS, "report")),
        )
        said = refused(
            tmp_path,
            "stage=evaluate",
            f"stage.model={root}/jobs/tiny/pretrain",
            f"stage.tokens={root}/jobs/tiny/tokenize",
            status=2,
        )
        assert "its tokenizer (vocabulary of 300) is not the one of" in said
        said = refused(
            tmp_path,
            "stage=pretrain",
            f"stage.tokens={root}/jobs/tiny/tokenize",
            "stage.steps=1",
            "model@stage.model=llama_2m",
            "stage.model.vocab_size=200",
            status=2,
        )
        assert "model.vocab_size: wanted at least 300, the vocabulary of" in said

    def test_an_export_that_would_differ_is_not_made(self, jobs, tmp_path):
        said = refused(
            tmp_path, "stage=export", f"stage.model={jobs}/pretrain", "stage.max_logit_difference=1e-30", status=3
        )
        assert "the exported model's logits differ from ours by" in said

    def test_a_classifier_is_no_language_model(self, jobs, tmp_path):
        said = refused(tmp_path, "stage=generate", f"stage.model={jobs}/finetune", "stage.prompt=x", status=2)
        assert "wanted a language model, but fine-tuning makes a classifier" in said

    def test_labels_that_training_has_not_seen(self, jobs, tmp_path):
        rows = [{"text": "a b", "label": "x", "split": split} for split in ("train", "valid")]
        rows.append({"text": "a b", "label": "y", "split": "test"})
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        said = refused(
            tmp_path,
            "stage=finetune",
            f"stage.model={jobs}/pretrain",
            f"stage.data={tmp_path}/rows.jsonl",
            "stage.seq_len=32",
            status=3,
        )
        assert "label 'y' of split 'test' is not in split 'train'" in said


def test_the_project_has_its_data():
    assert (PROJECT / "jobs/quickstart/NOTICE.md").is_file()
