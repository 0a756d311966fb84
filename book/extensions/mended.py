"""Fixes of small faults in the builder's output that would stop a script or a screen reader."""


def mend(app, pagename, templatename, context, doctree):
    # Thebe, which no page uses, declares its constants twice, and the second time is an error
    context["script_files"][:] = [script for script in context["script_files"]
                                  if "thebe" not in str(script.attributes.get("body") or script.filename).lower()]
    if "body" in context:  # a list may contain items only, and entries of a bibliography are items
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def setup(app):
    app.connect("html-page-context", mend, priority=950)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
