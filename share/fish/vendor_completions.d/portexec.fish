# fish completion of portexec, as `portexec --completion fish` prints it

function __portexec_place --description 'Print of what kind the next word is, and what else matters for it'
    set -l words (commandline -opc)
    # The word at the end is the value of an option that has none yet.
    argparse --stop-nonopt l/listen=+ b/backlog= host= socket-mode= H/hand-off= remap=+ first-fd= no-pid e/env=+ env-file=+ port-file= export= json q/quiet v/verbose then= ready= ready-timeout= ready-fd= restart= lazy log= control-fd= k/kill-after= name= detach reuse project= list url stop all logs f/follow forget n/dry-run check completion= h help V/version -- $words[2..] . 2>/dev/null
    or return
    set -e argv[-1]
    if set -q _flag_url; or set -q _flag_stop; or set -q _flag_logs; or set -q _flag_forget
        set -l state '(starting|ready|stopping),'
        set -q _flag_logs; and set state '[a-z]'
        set -q _flag_forget; and set state '(ended|stopped|killed|portexec)'
        string join \n name $state $_flag_project
    else if set -q _flag_list
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
    NO_COLOR=1 $words[1] --list --project=$place[3] 2>/dev/null | string replace --regex --filter "^([A-Za-z0-9_-]+) +$place[2].*" '$1'
end

function __portexec_command
    set -l words (__portexec_place)
    complete --do-complete=(string join ' ' -- (string escape -- $words[2..]) (commandline -ct))
end

complete -c portexec -f
complete -c portexec -n '__portexec_at start command' -a '(__portexec_command)'
complete -c portexec -n '__portexec_at name' -a '(__portexec_names)' -d 'server with a name'
complete -c portexec -n 'not __portexec_at command' -s l -l listen -x -d 'what to listen on; default 127.0.0.1:0'
complete -c portexec -n 'not __portexec_at command' -s b -l backlog -x -d 'how many connections may wait; default: the most'
complete -c portexec -n 'not __portexec_at command' -l host -x -d 'what other machines are told, in {host} and {url}'
complete -c portexec -n 'not __portexec_at command' -l socket-mode -x -d 'who may use unix sockets, as 660; default by umask'
complete -c portexec -n 'not __portexec_at command' -s H -l hand-off -x -a 'auto fd guard hold' -d 'how the command gets the port; default auto'
complete -c portexec -n 'not __portexec_at command' -l remap -x -d 'a bind to this port gets the listener'\''s instead'
complete -c portexec -n 'not __portexec_at command' -l first-fd -x -d 'the first descriptor; default 3, 0 is stdin'
complete -c portexec -n 'not __portexec_at command' -l no-pid -d 'leave LISTEN_PID out, behind make or uv run'
complete -c portexec -n 'not __portexec_at command' -s e -l env -x -d 'set a variable of the command'
complete -c portexec -n 'not __portexec_at command' -l env-file -r -F -d 'read variables, dotenv syntax; knows ${PORT}'
complete -c portexec -n 'not __portexec_at command' -l port-file -r -F -d 'write the first listener'\''s number to FILE'
complete -c portexec -n 'not __portexec_at command' -l export -r -F -d 'append PORT=NUMBER lines, as to $GITHUB_ENV'
complete -c portexec -n 'not __portexec_at command' -l json -d 'announce on stderr as one JSON line'
complete -c portexec -n 'not __portexec_at command' -s q -l quiet -d 'announce nothing'
complete -c portexec -n 'not __portexec_at command' -s v -l verbose -d 'say what was chosen and why'
complete -c portexec -n 'not __portexec_at command' -l then -x -a '(__fish_complete_command)' -d 'when ready, run this in a shell, then stop'
complete -c portexec -n 'not __portexec_at command' -l ready -x -a 'listen accept http https notify none' -d 'listen|accept|http[s][:PATH]|notify|none'
complete -c portexec -n 'not __portexec_at command' -l ready-timeout -x -d 'give up with status 124; default 60s'
complete -c portexec -n 'not __portexec_at command' -l ready-fd -x -d 'write one JSON line to descriptor N when ready'
complete -c portexec -n 'not __portexec_at command' -l restart -x -a 'no on-failure always' -d 'start the command again, on the same socket'
complete -c portexec -n 'not __portexec_at command' -l lazy -d 'start the command at the first connection'
complete -c portexec -n 'not __portexec_at command' -l log -r -F -d 'the command'\''s output; its end is shown on failure'
complete -c portexec -n 'not __portexec_at command' -l control-fd -x -d 'be driven by a program: JSON lines on this socket'
complete -c portexec -n 'not __portexec_at command' -s k -l kill-after -x -d 'from TERM to KILL of what is left; default 5s'
complete -c portexec -n 'not __portexec_at command' -l name -x -d 'run it under this name, for --url, --stop, --logs'
complete -c portexec -n 'not __portexec_at command' -l detach -d 'with --name: go to the background when ready, and print the address'
complete -c portexec -n 'not __portexec_at command' -l reuse -d 'with --detach: if the same server runs already, use that'
complete -c portexec -n 'not __portexec_at command' -l project -x -a '(__fish_complete_directories)' -d 'the project of the names; default: the nearest directory upwards with .git'
complete -c portexec -n 'not __portexec_at command' -l list -d 'show what runs and what ended'
complete -c portexec -n 'not __portexec_at command' -l url -d 'wait until the server is ready, print its address'
complete -c portexec -n 'not __portexec_at command' -l stop -d 'stop it, wait until nothing is left'
complete -c portexec -n 'not __portexec_at command' -l all -d 'with --stop and --forget: all of this project'
complete -c portexec -n 'not __portexec_at command' -l logs -d 'print what it has written'
complete -c portexec -n 'not __portexec_at command' -s f -l follow -d 'with --logs: go on until it ends'
complete -c portexec -n 'not __portexec_at command' -l forget -d 'take what ended off the list, with its log'
complete -c portexec -n 'not __portexec_at command' -s n -l dry-run -d 'print the plan and exit'
complete -c portexec -n 'not __portexec_at command' -l check -d 'tell what this machine can do, and exit'
complete -c portexec -n 'not __portexec_at command' -l completion -x -a 'bash zsh fish' -d 'print the completion for a shell, and exit'
complete -c portexec -n 'not __portexec_at command' -s h -d 'show the options most used and exit'
complete -c portexec -n 'not __portexec_at command' -l help -d 'show all options and exit'
complete -c portexec -n 'not __portexec_at command' -s V -l version -d 'show the version and exit'
