"""`--completion SHELL`: scripts by which bash, zsh and fish complete portexec's words. Made from the table of options. Pure.

    an option           its names, and its values: those of a fixed set, files, directories
    the command         as if portexec did not stand before it
    names of runs       from `portexec --list`: of those that run after --url and --stop, of those that have ended after
                        --forget, of both after --logs

Each script finds by itself where the options end: at the first word that is neither an option nor the value of one.
"""

from __future__ import annotations

from portexec.command.plan import HAND_OFFS
from portexec.errors import UsageError
from portexec.names.registry import READY, STARTING, STOPPING
from portexec.options import GROUPS, Option
from portexec.request import READY_FORMS, RESTARTS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

SHELLS = ("bash", "zsh", "fish")

_OPTIONS = [option for _, group in GROUPS for option in group]
_VALUES = {"--hand-off": HAND_OFFS, "--ready": READY_FORMS, "--restart": RESTARTS, "--completion": SHELLS}
# Rows of `--list`, as regular expressions: names of other projects have their directory before them; the head is in capitals.
ROWS = {
    "name": "[A-Za-z0-9_-]+",
    "any": "[a-z]",
    "running": f"({'|'.join((STARTING, READY, STOPPING))}),",
    "ended": "(ended|stopped|killed|portexec)",
}
_FILE, _DIRECTORY, _COMMAND = "FILE", "DIR", "COMMAND"  # as the table calls the values of these kinds


def script(shell: str) -> str:
    """The completion script for a shell. Raises UsageError for a shell that has none."""
    if shell not in SHELLS:
        raise UsageError(f"{shell!r} is not a known shell", f"one of {', '.join(SHELLS)}", about="--completion")
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]()


def _names(options: Iterable[Option]) -> list[str]:
    return [name for option in options for name in (option.short, option.long) if name]


def _letters(options: Iterable[Option]) -> str:
    return "".join(option.short[1:] for option in options)


def _verbs(*, with_names: bool) -> list[str]:
    return [option.long for option in _OPTIONS if option.verb and bool(option.metavar) == with_names]


def _filled(template: str, **parts: str) -> str:
    for name, text in (ROWS | parts).items():
        template = template.replace(f"@{name}@", text)
    return template


_BASH = r"""# bash completion of portexec, as `portexec --completion bash` prints it

_portexec_split() {
    # The words up to the cursor. COMP_WORDS has parts of words: bash divides them at = and : as well.
    local rest=${COMP_LINE:0:COMP_POINT} part index
    for ((index = 0; index <= COMP_CWORD; index++)); do
        part=${COMP_WORDS[index]}
        if ((index == 0)) || [[ $rest == [[:space:]]* ]]; then
            rest=${rest#"${rest%%[![:space:]]*}"}
            words+=("$part") starts+=("$index")
        else
            words[${#words[@]} - 1]+=$part
        fi
        rest=${rest#"$part"}
    done
}

_portexec_offer() {
    mapfile -t COMPREPLY < <(compgen -W "$*" -- "$current")
}

_portexec_value() {
    case $1 in
@values@
    esac
}

_portexec_names() {
    local row state='@running@'
    [[ $verb == --logs ]] && state='@any@'
    [[ $verb == --forget ]] && state='@ended@'
    while read -r row; do
        [[ $row =~ ^(@name@)' '+$state && ${BASH_REMATCH[1]} == "$current"* ]] && COMPREPLY+=("${BASH_REMATCH[1]}")
    done < <(NO_COLOR=1 "${words[0]}" --list ${project:+--project "$project"} 2>/dev/null)
}

_portexec_command() {
    # The command begins at this part of the line.
    if declare -F _comp_command_offset >/dev/null; then
        _comp_command_offset "$1"
    elif declare -F _command_offset >/dev/null; then
        _command_offset "$1"
    elif ((COMP_CWORD == $1)); then
        mapfile -t COMPREPLY < <(compgen -c -- "$current")
    else
        compopt -o default
    fi
}

_portexec() {
    local words=() starts=() current option= verb= project= i last
    COMPREPLY=()
    _portexec_split
    last=$((${#words[@]} - 1))
    current=${words[last]}
    for ((i = 1; i < last; i++)); do
        if [[ $option ]]; then
            [[ $option == --project ]] && project=${words[i]}
            option=
            continue
        fi
        case ${words[i]} in
            @verbs@) verb=${words[i]} ;;
            @long_with_value@) option=${words[i]} ;;
            --) _portexec_command "${starts[i + 1]}"; return ;;
            --*) ;;
            -?*) [[ ${words[i]} =~ ^-[@switches@]*([@letters_with_value@])$ ]] && option=-${BASH_REMATCH[1]} ;;
            *) [[ $verb ]] || { _portexec_command "${starts[i]}"; return; } ;;
        esac
    done
    if [[ $option ]]; then
        _portexec_value "$option"
    elif [[ $current == --*=* ]]; then
        option=${current%%=*} current=${current#*=}
        _portexec_value "$option"
    elif [[ $current == -* ]]; then
        _portexec_offer @options@
    else
        case $verb in
            '') _portexec_command "${starts[last]}" ;;
            @naming@) _portexec_names ;;
        esac
    fi
}

complete -F _portexec portexec
"""


_BASH_ACTIONS = {
    _FILE: "compopt -o default",
    _DIRECTORY: "compopt -o dirnames",
    _COMMAND: 'mapfile -t COMPREPLY < <(compgen -c -- "$current")',
}


def _bash() -> str:
    with_value = [option for option in _OPTIONS if option.has_value]
    return _filled(
        _BASH,
        values="\n".join(line for option in with_value if (line := _bash_values(option))),
        verbs="|".join(_verbs(with_names=True) + _verbs(with_names=False)),
        naming="|".join(_verbs(with_names=True)),
        long_with_value="|".join(option.long for option in with_value),
        letters_with_value=_letters(with_value),
        switches=_letters(option for option in _OPTIONS if not option.has_value),
        options=" ".join(_names(_OPTIONS)),
    )


def _bash_values(option: Option) -> str:
    """The line that completes the value of an option; empty for values that cannot be completed."""
    fixed = " ".join(_VALUES.get(option.long, ()))
    action = f"_portexec_offer {fixed}" if fixed else _BASH_ACTIONS.get(option.metavar)
    return f"        {'|'.join(_names([option]))}) {action} ;;" if action else ""


_ZSH = r"""#compdef portexec
# zsh completion of portexec, as `portexec --completion zsh` prints it

_portexec_names() {
    local row state='@running@' project=$opt_args[--project] MATCH MBEGIN MEND
    local -a names match mbegin mend
    (( $+opt_args[--logs] )) && state='@any@'
    (( $+opt_args[--forget] )) && state='@ended@'
    for row in ${(f)"$(_call_program names NO_COLOR=1 $program --list ${project:+--project $project})"}; do
        [[ $row =~ "^(@name@) +$state" ]] && names+=($match[1])
    done
    _wanted names expl 'server with a name' compadd -a names
}

_portexec() {
    local curcontext=$curcontext program=$words[1] state line expl ret=1
    local -A opt_args
    local -a options
    options=(
@options@
    )
    _arguments -C -s -S -A '-*' : $options '*:: :->words' && ret=0
    if [[ $state == words ]]; then
        # A `--` with no option before it is still among the words.
        [[ $words[1] == -- ]] && (( CURRENT > 1 )) && { shift words; (( CURRENT-- )) }
        if (( @has_naming_verb@ )); then
            _portexec_names && ret=0
        elif (( @has_other_verb@ )); then
            _message 'no more words'
        elif (( CURRENT == 1 )); then
            _command_names -e && ret=0
        else
            _normal && ret=0
        fi
    fi
    return ret
}

if [[ $funcstack[1] == _portexec ]]; then
    _portexec "$@"
else
    compdef _portexec portexec
fi
"""


_ZSH_ACTIONS = {_FILE: "_files", _DIRECTORY: "_files -/", _COMMAND: "_cmdstring"}


def _zsh() -> str:
    return _filled(
        _ZSH,
        options="\n".join(line for option in _OPTIONS for line in _zsh_option(option)),
        has_naming_verb=_zsh_given(_verbs(with_names=True)),
        has_other_verb=_zsh_given(_verbs(with_names=False)),
    )


def _zsh_given(verbs: Iterable[str]) -> str:
    return " || ".join(f"$+opt_args[{verb}]" for verb in verbs)


def _zsh_option(option: Option) -> list[str]:
    """The specifications of an option, one for each of its names, as `_arguments` in zshcompsys(1) has them."""
    names = _names([option])
    once = "*" if option.repeatable else f"({' '.join(names)})"
    text = f"[{_escaped(option.help, '[]:')}]"
    if not option.has_value:
        return [f"        {_quoted(once + name + text)}" for name in names]
    fixed = " ".join(_VALUES.get(option.long, ()))
    action = f"({fixed})" if fixed else _ZSH_ACTIONS.get(option.metavar, " ")
    value = f":{_escaped(option.metavar, ':')}:{action}"
    return [f"        {_quoted(once + name + ('=' if name == option.long else '+') + text + value)}" for name in names]


_FISH = r"""# fish completion of portexec, as `portexec --completion fish` prints it

function __portexec_place --description 'Print of what kind the next word is, and what else matters for it'
    set -l words (commandline -opc)
    # The word at the end is the value of an option that has none yet.
    argparse --stop-nonopt @specifications@ -- $words[2..] . 2>/dev/null
    or return
    set -e argv[-1]
    if @has_naming_verb@
        set -l state '@running@'
        set -q _flag_logs; and set state '@any@'
        set -q _flag_forget; and set state '@ended@'
        string join \n name $state $_flag_project
    else if @has_other_verb@
        echo nothing
    else if set -q argv[1]
        string join \n command $argv
    else
        echo start
    end
end

function __portexec_at --description 'Whether the next word is of one of these kinds'
    contains -- (__portexec_place)[1] $argv
end

function __portexec_names
    set -l words (commandline -opc)
    set -l place (__portexec_place)
    NO_COLOR=1 $words[1] --list --project=$place[3] 2>/dev/null | string replace --regex --filter "^(@name@) +$place[2].*" '$1'
end

function __portexec_command
    set -l words (__portexec_place)
    complete --do-complete=(string join ' ' -- (string escape -- $words[2..]) (commandline -ct))
end

complete -c portexec -f
complete -c portexec -n '__portexec_at start command' -a '(__portexec_command)'
complete -c portexec -n '__portexec_at name' -a '(__portexec_names)' -d 'server with a name'
@options@
"""
_FISH_FILES = "-r -F"
_FISH_ACTIONS = {
    _FILE: _FISH_FILES,
    _DIRECTORY: "-x -a '(__fish_complete_directories)'",
    _COMMAND: "-x -a '(__fish_complete_command)'",
}


def _fish() -> str:
    return _filled(
        _FISH,
        specifications=" ".join(map(_fish_specification, _OPTIONS)),
        has_naming_verb=_fish_given(_verbs(with_names=True)),
        has_other_verb=_fish_given(_verbs(with_names=False)),
        options="\n".join(map(_fish_option, _OPTIONS)),
    )


def _fish_given(verbs: Iterable[str]) -> str:
    return "; or ".join(f"set -q _flag_{verb[2:]}" for verb in verbs)


def _fish_specification(option: Option) -> str:
    """An option as argparse(1) of fish has it."""
    name = "/".join(filter(None, (option.short[1:], option.long[2:])))
    return name + (("=+" if option.repeatable else "=") if option.has_value else "")


def _fish_option(option: Option) -> str:
    words = ["complete -c portexec -n 'not __portexec_at command'"]
    words += [f"-s {option.short[1:]}"] if option.short else []
    words += [f"-l {option.long[2:]}"] if option.long else []
    fixed = " ".join(_VALUES.get(option.long, ()))
    if option.has_value:
        words.append(f"-x -a '{fixed}'" if fixed else _FISH_ACTIONS.get(option.metavar, "-x"))
    return " ".join([*words, f"-d {_quoted(option.help)}"])


def _escaped(text: str, special: str) -> str:
    return "".join(f"\\{character}" if character in special else character for character in text)


def _quoted(text: str) -> str:
    """One word for a shell; all three understand this form."""
    return "'" + text.replace("'", "'\\''") + "'"
