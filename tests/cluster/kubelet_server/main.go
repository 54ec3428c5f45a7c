// What the API server asks a kubelet for: `kubectl attach` and `exec` through Kubernetes' own streaming server (SPDY and
// websockets), and everything else (logs) through to the process kubelet of kubelet.py.
//
//	kubelet_server CERTIFICATE KEY BACKEND    # prints its port; ends when its standard input does
//
// BACKEND is kubelet.py's own HTTP server. It answers /command/NAMESPACE/POD/CONTAINER with the words in front of a command that
// is to run in there, and /resize/NAMESPACE/POD/ROWS/COLUMNS. A container's terminal is the abstract socket @NAMESPACE/POD.
package main

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/types"
	protocols "k8s.io/apimachinery/pkg/util/remotecommand"
	terminal "k8s.io/client-go/tools/remotecommand"
	streaming "k8s.io/kubernetes/pkg/kubelet/cri/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"
)

const idle, creation = time.Hour, 30 * time.Second

// The process kubelet behind a URL.
type backend string

func (b backend) get(parts ...string) (*http.Response, error) {
	answer, err := http.Get(string(b) + "/" + strings.Join(parts, "/"))
	if err == nil && answer.StatusCode != http.StatusOK {
		answer.Body.Close()
		err = fmt.Errorf("%s: %s", strings.Join(parts, "/"), answer.Status)
	}
	return answer, err
}

func (b backend) AttachContainer(pod string, _ types.UID, _ string, in io.Reader, out, _ io.WriteCloser, _ bool, sizes <-chan terminal.TerminalSize) error {
	connection, err := net.Dial("unix", "@"+pod)
	if err != nil {
		return err
	}
	defer connection.Close()
	go func() {
		for size := range sizes {
			if answer, err := b.get("resize", pod, fmt.Sprint(size.Height), fmt.Sprint(size.Width)); err == nil {
				answer.Body.Close()
			}
		}
	}()
	if in != nil {
		go io.Copy(connection, in)
	}
	_, err = io.Copy(out, connection)
	return err
}

func (b backend) ExecInContainer(pod string, _ types.UID, container string, words []string, in io.Reader, out, errors io.WriteCloser, _ bool, _ <-chan terminal.TerminalSize, _ time.Duration) error {
	answer, err := b.get("command", pod, container)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	var inside []string
	if err := json.NewDecoder(answer.Body).Decode(&inside); err != nil {
		return err
	}
	words = append(inside, words...)
	command := exec.Command(words[0], words[1:]...)
	command.Stdout = out
	if errors != nil {
		command.Stderr = errors
	}
	if in != nil {
		pipe, err := command.StdinPipe() // Stdin = in would wait for the client's end of input when the command has ended
		if err != nil {
			return err
		}
		go func() {
			io.Copy(pipe, in)
			pipe.Close()
		}()
	}
	err = command.Run()
	if ended, ok := err.(*exec.ExitError); ok {
		return utilexec.CodeExitError{Err: err, Code: ended.ExitCode()}
	}
	return err
}

func (b backend) ServeHTTP(answer http.ResponseWriter, request *http.Request) {
	parts := strings.Split(strings.Trim(request.URL.Path, "/"), "/")
	if len(parts) != 4 {
		http.NotFound(answer, request)
		return
	}
	options, err := streaming.NewOptions(request)
	if err != nil {
		http.Error(answer, err.Error(), http.StatusBadRequest)
		return
	}
	pod, container, versions := parts[1]+"/"+parts[2], parts[3], protocols.SupportedStreamingProtocols
	if parts[0] == "attach" {
		streaming.ServeAttach(answer, request, b, pod, "", container, options, idle, creation, versions)
	} else {
		words := request.Form["command"]
		streaming.ServeExec(answer, request, b, pod, "", container, words, options, idle, creation, versions)
	}
}

func main() {
	kubelet, err := url.Parse(os.Args[3])
	if err != nil {
		log.Fatal(err)
	}
	certificate, err := tls.LoadX509KeyPair(os.Args[1], os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{certificate}})
	if err != nil {
		log.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(kubelet)
	proxy.FlushInterval = -1 // logs that are followed come line by line
	http.Handle("/attach/", backend(os.Args[3]))
	http.Handle("/exec/", backend(os.Args[3]))
	http.Handle("/", proxy)
	go func() {
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	log.Fatal(http.Serve(listener, nil))
}
