// The first process of a machine that Bochs emulates (bochs.py): runs the program, prints how it ended, and restarts
// the machine, which ends Bochs.
#include <stdio.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

int main(void) {
    int status = 0;
    const pid_t program = fork();
    if (!program) {
        execl("/program", "program", "--results", (char*)NULL);
        _exit(127);
    }
    if (program < 0 || waitpid(program, &status, 0) != program) return 1;
    printf("\nstatus %d\n", status);
    fflush(stdout);
    tcdrain(STDOUT_FILENO);
    return reboot(RB_AUTOBOOT);
}
