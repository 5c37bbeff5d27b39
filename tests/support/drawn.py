"""What a figure shows: its texts, where they lie, and that they keep out of each other's way."""


def assert_readable(figure, monkeypatch):
  """No text overlaps another one or leaves the figure."""
  width, height = figure.canvas.get_width_height()
  found = boxes(figure, monkeypatch)
  for i, (text, a) in enumerate(found):
    assert min(a.x0, a.y0) >= 0, text
    assert a.x1 <= width, text
    assert a.y1 <= height, text
    for other, b in found[i + 1 :]:
      wide = min(a.x1, b.x1) - max(a.x0, b.x0)
      tall = min(a.y1, b.y1) - max(a.y0, b.y0)
      # Boxes hold room for descenders, so neighbours may share a sliver of it.
      assert wide <= 0 or tall <= 0.25 * min(a.height, b.height), (text, other)
  return found


def boxes(figure, monkeypatch):
  """The texts that are drawn, with their extents in pixels; slanted ones left out."""
  renderer = figure.canvas.get_renderer()
  drawn = []

  def record(gc, x, y, s, prop, angle, ismath=False, mtext=None):
    drawn.append(mtext)

  monkeypatch.setattr(renderer, "draw_text", record)
  figure.draw(renderer)
  return [
    (t.get_text(), t.get_window_extent(renderer)) for t in drawn if t.get_rotation() % 90 == 0
  ]
