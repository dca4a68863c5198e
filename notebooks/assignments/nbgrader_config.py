"""Settings of nbgrader's own commands, run in this folder: `nbgrader generate_assignment a2`."""

from pathlib import Path

c = get_config()  # noqa: F821  (nbgrader defines it)
c.CourseDirectory.course_id = "advlab"
c.CourseDirectory.root = str(Path(__file__).parents[2] / "outputs" / "course")
c.CourseDirectory.source_directory = str(Path(__file__).parent)
c.ExecutePreprocessor.timeout = 60
c.IncludeHeaderFooter.header = ""
