"""Without a terminal, progress is plain lines, of what takes long."""

from jaxmerge.cli import progress


def test_a_phase_has_a_line_every_few_seconds_and_one_at_its_end(capsys):
  now = [0.0]
  show = progress.lines(pause=5.0, clock=lambda: now[0])

  def event(done, at, phase="atm", **more):
    now[0] = at
    show({"phase": phase, "done": done, "total": 8, "unit": "rounds", **more})

  event(0, 0.0)
  event(1, 1.0)
  event(2, 6.0, numbers={"mean": 0.5})
  event(3, 7.0)
  event(8, 8.0)
  event(0, 8.0, "short")
  event(8, 9.0, "short")
  show({"message": "resumed"})
  assert capsys.readouterr().err.splitlines() == [
    "atm: 2/8 rounds, mean 0.5",
    "atm: 8/8 rounds",
    "resumed",
  ]
