// Go's net/http as a client of HTTP/2. Prints one line for each failure, and "ok".
package main

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"os"
	"sync"
)

func main() {
	base := os.Args[1]
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true}
	client := &http.Client{Transport: transport}
	var group sync.WaitGroup
	var lock sync.Mutex
	failed := 0
	fail := func(format string, values ...any) {
		lock.Lock()
		defer lock.Unlock()
		failed++
		fmt.Printf(format+"\n", values...)
	}
	check := func(method, path string, body []byte, expected string) {
		defer group.Done()
		request, err := http.NewRequest(method, base+path, nil)
		if err != nil {
			fail("%s %s: %v", method, path, err)
			return
		}
		if path == "/trailers" {
			request.Header.Set("Te", "trailers")
		}
		if body != nil {
			// Without a length: the body is streamed.
			request.Body = io.NopCloser(bytes.NewReader(body))
		}
		response, err := client.Do(request)
		if err != nil {
			fail("%s %s: %v", method, path, err)
			return
		}
		defer response.Body.Close()
		text, err := io.ReadAll(response.Body)
		if err != nil || response.StatusCode != 200 || response.ProtoMajor != 2 || string(text) != expected {
			fail("%s %s: %d %s %v, %d bytes", method, path, response.StatusCode, response.Proto, err, len(text))
		}
		if path == "/trailers" && response.Trailer.Get("X-Sum") != "17" {
			fail("trailers: %v", response.Trailer)
		}
	}
	large := bytes.Repeat([]byte("x"), 300000)
	for number := 0; number < 100; number++ {
		group.Add(4)
		go check("GET", fmt.Sprintf("/stored/%d", number%5), nil, "stored")
		go check("GET", "/large", nil, string(large))
		go check("GET", "/trailers", nil, "ok")
		go check("POST", "/up", large[:1000*number], fmt.Sprintf("%d bytes", 1000*number))
	}
	group.Wait()
	// As many uploads at once as there are streams, and one that has the connection for itself.
	for number := 0; number < 100; number++ {
		group.Add(1)
		go check("PUT", "/up", large[number:], fmt.Sprintf("%d bytes", 300000-number))
	}
	group.Wait()
	group.Add(1)
	go check("PUT", "/up", bytes.Repeat(large, 50), "15000000 bytes")
	for number := 0; number < 99; number++ {
		group.Add(1)
		go check("PUT", "/up", large[number:], fmt.Sprintf("%d bytes", 300000-number))
	}
	group.Wait()
	if failed == 0 {
		fmt.Println("ok")
	}
}
