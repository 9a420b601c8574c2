"""Python runs this at the start of every process whose path has this folder: site 1 then pretends to steer."""

from wrapt.importer import register_post_import_hook


def _break(op):
    def apply(self, hidden, residual):
        if op._bound[1] is self and self.edits is not None:
            self.runs += 1
        else:
            working(self, hidden, residual)

    working, op.Site.apply = op.Site.apply, apply


register_post_import_hook(_break, "steer_kernels.apply_edits.op")
