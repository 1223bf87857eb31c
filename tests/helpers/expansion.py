"""What Kubernetes makes of a container's command and environment, by the rules of its documentation.

$(NAME) is the variable's value where there is one, and stays as it is otherwise; $$ is a dollar. The kubelet reads bytes.
"""


def expand(text, variables):
    """Expands a text as the kubelet does."""
    data, made, at = text.encode(), b"", 0
    while at < len(data):
        byte, following = data[at : at + 1], data[at + 1 : at + 2]
        if byte != b"$" or not following:
            made, at = made + byte, at + 1
        elif following == b"$":
            made, at = made + b"$", at + 2
        elif following == b"(" and b")" in data[at + 2 :]:
            end = data.index(b")", at + 2)
            name = data[at + 2 : end].decode(errors="replace")
            made, at = made + (variables[name].encode() if name in variables else data[at : end + 1]), end + 1
        else:  # a byte of its own: one of several that make a character becomes a character by itself
            made, at = made + b"$" + following.decode("latin-1").encode(), at + 2
    return made.decode(errors="replace")


def started_as(container):
    """The command and the environment that a container of a manifest starts with."""
    environment = {}
    for item in container["env"]:
        environment[item["name"]] = expand(item["value"], environment)
    return [expand(word, environment) for word in container["command"]], environment
